"""Encodes images and videos with vLLM's own model, in batches, and decides about each.

``launch`` runs on the engine's thread, and does not wait for the device. What it returns decides, on any thread: it
waits for the encoder, and computes spectra and selections on a stream beside the engine's.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.utils.torch_utils import PIN_MEMORY

from eadaprune_vllm.core.options import Budget, PruneOptions
from eadaprune_vllm.core.prune import Encoding, compute_spectra, finite, prune
from eadaprune_vllm.core.selectors import BY_ATTENTION, VisualTokens
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.attention import capturing
from eadaprune_vllm.engine.cudagraph import encode
from eadaprune_vllm.engine.device import Stopwatch, beside_engine, on_engine_stream
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, DecisionResult, Explanation

logger = logging.getLogger("vllm." + __name__)


@dataclass(frozen=True)
class EncoderOutput:
    """One image or video, encoded by the model.

    Attributes:
        embeds: ``[placeholders, W]`` on the model's device, its multimodal embeddings without pruning.
        features: ``[N, D]`` on the same device, for budget and selection; None if they are made of the embeddings.
        attention: ``[n]`` on the model's device, received by its patches, if it was captured.
        stopwatch: of the batch.
        share: of the batch's time.
    """

    embeds: torch.Tensor
    features: torch.Tensor | None
    attention: torch.Tensor | None
    stopwatch: Stopwatch
    share: float


@torch.inference_mode()
def launch(
    runner: Any, requests: Sequence[DecisionRequest], respond: bool = True
) -> Callable[[], list[DecisionResponse]]:
    """Encode, and prepare decisions.

    Args:
        runner: vLLM's model runner, with a model of ours.
        requests: of one batch, within the memory that vLLM profiled for the encoder.
        respond: whether this rank decides. Other tensor-parallel ranks take part in encoding only.

    Returns:
        A function that decides, once, on any thread. It returns one response per request, if ``respond``. An error of
        one item is the response about that item.

    Raises:
        Exception: if encoding a batch fails with tensor parallelism, where all ranks must do the same in the same
            order, so that no rank may retry.
    """
    model = runner.get_model()
    options = [PruneOptions.model_validate_json(request.options) for request in requests]
    multimodal = runner.vllm_config.model_config.multimodal_config
    # With the encoder in data parallel mode, rank 0 does not encode every item itself.
    can_capture = model.eadaprune_captures_attention and multimodal.mm_encoder_tp_mode != "data"
    budget = ServerOptions.of(multimodal).budget
    captured = [can_capture and each.selector in BY_ATTENTION for each in options]
    found: dict[int, DecisionResponse] = {}
    with on_engine_stream(runner):
        launched = Stopwatch.begin(runner.device)
        batches = list(_encode_all(runner, requests, captured, found))
        launched.stop()
    if not respond:
        return list

    @torch.inference_mode()
    def decide() -> list[DecisionResponse]:
        with beside_engine(launched):
            for batch in batches:
                _decide_batch(model, requests, options, budget, batch, found)
        batches.clear()
        return [found[index] for index in range(len(requests))]

    return decide


def _decide_batch(
    model: Any,
    requests: Sequence[DecisionRequest],
    options: Sequence[PruneOptions],
    budget: Budget,
    batch: dict[int, EncoderOutput],
    found: dict[int, DecisionResponse],
) -> None:
    encodings: dict[int, Encoding] = {}
    for index, encoded in batch.items():
        with isolate_errors(found, index):
            encodings[index] = _encoding(model, requests[index], encoded, budget)
    try:
        compute_spectra([*encodings.values()], [options[index] for index in encodings])
    except Exception as error:  # each spectrum is then computed by itself, and the bad one fails alone
        logger.warning("Spectra of %d images were not computed together (%r)", len(encodings), error)
    for index, encoding in encodings.items():
        with isolate_errors(found, index):
            found[index] = _respond(requests[index], options[index], encoding, batch[index])


@contextmanager
def isolate_errors(found: dict[int, DecisionResponse], index: int) -> Iterator[None]:
    """Context manager that turns an exception into the response to one request, that of this index."""
    try:
        yield
    except NonFiniteFeaturesError as error:
        found[index] = DecisionError(str(error), "features")
    except torch.OutOfMemoryError:
        logger.warning("Not enough memory for an image", exc_info=True)
        found[index] = DecisionError("there is not enough memory for this image")
    except Exception as error:
        logger.exception("An image could not be pruned")
        found[index] = DecisionError(f"this image could not be pruned: {error}")


def _encode_all(
    runner: Any, requests: Sequence[DecisionRequest], captured: Sequence[bool], found: dict[int, DecisionResponse]
) -> Iterator[dict[int, EncoderOutput]]:
    """Encode in vLLM's batches, and items whose attention is captured one by one.

    Yields:
        The outputs of a batch by index. Items that fail by themselves are missing; their errors are in ``found``.
    """
    order = sorted(range(len(requests)), key=lambda index: (captured[index], requests[index].modality))
    batched = [index for index in order if not captured[index]]
    yield from _encode_in_batches(runner, requests, batched, False, found)
    for index in order[len(batched) :]:
        yield from _encode_in_batches(runner, requests, [index], True, found)


def _encode_in_batches(
    runner: Any,
    requests: Sequence[DecisionRequest],
    indices: Sequence[int],
    capture: bool,
    found: dict[int, DecisionResponse],
) -> Iterator[dict[int, EncoderOutput]]:
    # A rank that retries would leave the others waiting in a collective.
    may_retry = runner.vllm_config.parallel_config.tensor_parallel_size == 1
    items = [(requests[index].modality, requests[index].item) for index in indices]
    remaining = iter(indices)
    for modality, count, kwargs in group_and_batch_mm_kwargs(items, device=runner.device, pin_memory=PIN_MEMORY):
        batch = [*islice(remaining, count)]
        encoded: list[EncoderOutput] = []
        try:
            encoded = _encode(runner, modality, kwargs, [requests[index] for index in batch], capture)
        except Exception as error:
            if not may_retry:
                raise
            if count == 1:
                with isolate_errors(found, batch[0]):
                    raise
            else:
                logger.warning("A batch of %d images could not be encoded (%r); encoding one by one", count, error)
        if encoded:
            yield dict(zip(batch, encoded, strict=True))
        elif count > 1:  # outside of the except block, whose traceback keeps the batch's memory alive
            for index in batch:
                yield from _encode_in_batches(runner, requests, [index], capture, found)


def _encode(
    runner: Any, modality: str, kwargs: Mapping[str, Any], requests: Sequence[DecisionRequest], capture: bool
) -> list[EncoderOutput]:
    """Encode one batch; ``kwargs`` are the model's arguments."""
    stopwatch = Stopwatch.begin(runner.device)
    with capturing(runner.get_model(), capture) as attention:
        embeds, features = encode(runner, modality, kwargs, eager=capture)
    received = attention()
    stopwatch.stop()
    return [
        EncoderOutput(
            embeds[number], None if features is None else features[number], received, stopwatch, 1 / len(requests)
        )
        for number in range(len(requests))
    ]


def _encoding(model: Any, request: DecisionRequest, encoded: EncoderOutput, budget: Budget) -> Encoding:
    layout = model.eadaprune_layout(model.config, request.modality, _data(request), request.num_placeholders)
    embeds, features = encoded.embeds, encoded.features
    if len(embeds) != request.num_placeholders:
        raise RuntimeError(
            f"the model made {len(embeds)} embeddings where vLLM expects {request.num_placeholders} placeholders"
        )
    if features is None:
        features = model.eadaprune_features(embeds[~layout.is_newline] if layout.newlines else embeds)
    attention = encoded.attention
    if attention is not None:
        attention = model.eadaprune_token_scores(request.modality, _data(request), attention.cpu())
    return Encoding(VisualTokens(features, attention), layout, budget)


def _respond(
    request: DecisionRequest, options: PruneOptions, encoding: Encoding, encoded: EncoderOutput
) -> DecisionResult:
    decision, embeds = prune(encoding, options), encoded.embeds
    encode_seconds = encoded.stopwatch.seconds() * encoded.share
    seconds = {"encode": encode_seconds, "spectrum": decision.spectrum_seconds, "select": decision.select_seconds}
    if request.explain:
        spectrum = encoding.spectrum(options.scope)
        explanation = Explanation(spectrum.curve(), spectrum.thresholds, list(encoding.layout.grids))
        return DecisionResult(decision, embeds[:0].cpu(), seconds, explanation)
    embeds = embeds[decision.placeholders].cpu()
    if not finite(embeds):
        raise NonFiniteFeaturesError(f"features of this image are too large for {embeds.dtype}")
    return DecisionResult(decision, embeds, seconds)


def _data(request: DecisionRequest) -> Mapping[str, Any]:
    data: Mapping[str, Any] = request.item.get_data()
    return data
