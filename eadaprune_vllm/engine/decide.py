"""Encoding images and videos with vLLM's own model, in batches, and the decision about each."""

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.utils.torch_utils import PIN_MEMORY

from eadaprune_vllm.core.options import Budget, PruneOptions
from eadaprune_vllm.core.prune import Encoding, compute_spectra, finite, prune
from eadaprune_vllm.core.selectors import BY_ATTENTION, VisualTokens
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.attention import capturing
from eadaprune_vllm.engine.cudagraph import encode
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, DecisionResult, Explanation

logger = logging.getLogger("vllm." + __name__)


@dataclass(frozen=True)
class Encoded:
    """One image or video, as the model encodes it.

    Attributes:
        rows: ``[placeholders, W]`` on the model's device, what the language model is fed with unpruned.
        features: ``[N, D]`` there too, what budget and selection go by; None if these are the rows.
        attention: ``[N]`` on the CPU, if it was observed.
        seconds: its share of the time.
    """

    rows: torch.Tensor
    features: torch.Tensor | None
    attention: torch.Tensor | None
    seconds: float


@torch.inference_mode()
def decide(runner: Any, requests: Sequence[DecisionRequest], answers: bool = True) -> list[DecisionResponse]:
    """Args:
        runner: vLLM's model runner, whose model is one of ours.
        requests: what to encode; together no more than the encoder's memory was measured with.
        answers: whether this rank answers. The others encode only, as all do together.

    Returns:
        An answer each, if it does. What fails alone says so.

    Raises:
        Exception: what encoding a batch raises where there are several ranks, which must do the same in the same order.
    """
    model = runner.get_model()
    options = [PruneOptions.model_validate_json(request.options) for request in requests]
    # Where ranks share items out, not all of them see one.
    multimodal = runner.vllm_config.model_config.multimodal_config
    seen = model.eadaprune_observes and multimodal.mm_encoder_tp_mode != "data"
    budget = ServerOptions.of(multimodal).budget
    observed = [seen and each.selector in BY_ATTENTION for each in options]
    found: dict[int, DecisionResponse] = {}
    for batch in _encoded(runner, requests, observed, found):
        if not answers:
            continue
        encodings: dict[int, Encoding] = {}
        for index, encoded in batch.items():
            with isolate_errors(found, index):
                encodings[index] = _encoding(model, requests[index], encoded, budget)
        try:
            compute_spectra([*encodings.values()], [options[index] for index in encodings])
        except Exception as error:  # what it fails over will fail by itself
            logger.warning("Spectra of %d images were not computed together (%r)", len(encodings), error)
        for index, encoding in encodings.items():
            # Selectors do a little work at a time, which NumPy's threads would mostly wait for one another with.
            with isolate_errors(found, index), _threads().limit(limits=1, user_api="blas"):
                found[index] = _response(requests[index], options[index], encoding, batch[index])
    return [found[index] for index in range(len(requests))] if answers else []


@contextmanager
def isolate_errors(found: dict[int, DecisionResponse], index: int) -> Iterator[None]:
    """What fails meanwhile fails for one request, of that index."""
    try:
        yield
    except NonFiniteFeaturesError as error:
        found[index] = DecisionError(str(error), "features")
    except torch.OutOfMemoryError:
        logger.warning("There is too little memory for an image", exc_info=True)
        found[index] = DecisionError("there is too little memory for this image")
    except Exception as error:
        logger.exception("Nothing could be decided about an image")
        found[index] = DecisionError(f"this image could not be encoded: {error}")


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _encoded(
    runner: Any, requests: Sequence[DecisionRequest], observed: Sequence[bool], found: dict[int, DecisionResponse]
) -> Iterator[dict[int, Encoded]]:
    """What the model makes of each, by its index. What vLLM would batch is a batch; where attention is observed, each
    is one by itself. What fails alone is in ``found``."""
    order = sorted(range(len(requests)), key=lambda index: (observed[index], requests[index].modality))
    together = [index for index in order if not observed[index]]
    yield from _in_batches(runner, requests, together, False, found)
    for index in order[len(together) :]:
        yield from _in_batches(runner, requests, [index], True, found)


def _in_batches(
    runner: Any,
    requests: Sequence[DecisionRequest],
    indices: Sequence[int],
    observed: bool,
    found: dict[int, DecisionResponse],
) -> Iterator[dict[int, Encoded]]:
    # Other ranks would go on, or wait in a collective for one that begins anew.
    may_retry = runner.vllm_config.parallel_config.tensor_parallel_size == 1
    items = [(requests[index].modality, requests[index].item) for index in indices]
    left = iter(indices)
    for modality, count, kwargs in group_and_batch_mm_kwargs(items, device=runner.device, pin_memory=PIN_MEMORY):
        batch = [*islice(left, count)]
        encoded: list[Encoded] = []
        try:
            encoded = _encode(runner, modality, kwargs, [requests[index] for index in batch], observed)
        except Exception as error:
            if not may_retry:
                raise
            if count == 1:
                with isolate_errors(found, batch[0]):
                    raise
            else:
                logger.warning("A batch of %d images could not be encoded (%r); each is tried alone", count, error)
        if encoded:
            yield dict(zip(batch, encoded, strict=True))
        elif count > 1:  # outside of the handler, which holds what was allocated
            for index in batch:
                yield from _in_batches(runner, requests, [index], observed, found)


def _encode(
    runner: Any, modality: str, kwargs: Mapping[str, Any], requests: Sequence[DecisionRequest], observed: bool
) -> list[Encoded]:
    """A batch, whose arguments of the model these are."""
    model, device = runner.get_model(), runner.device
    start = time.perf_counter()
    with capturing(model, observed) as attention:
        rows, features = encode(runner, modality, kwargs, eager=observed)
    received = attention()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - start) / len(requests)
    return [
        Encoded(
            rows[number],
            None if features is None else features[number],
            None if received is None else model.eadaprune_token_scores(modality, _data(request), received.cpu()),
            seconds,
        )
        for number, request in enumerate(requests)
    ]


def _encoding(model: Any, request: DecisionRequest, encoded: Encoded, budget: Budget) -> Encoding:
    layout = model.eadaprune_layout(model.config, request.modality, _data(request), request.num_placeholders)
    rows, features = encoded.rows, encoded.features
    if len(rows) != request.num_placeholders:
        raise RuntimeError(f"{len(rows)} rows were encoded where vLLM expects {request.num_placeholders} placeholders")
    if features is None:
        features = model.eadaprune_features(rows[~layout.is_newline] if layout.newlines else rows)
    return Encoding(VisualTokens(features, encoded.attention), layout, budget)


def _response(request: DecisionRequest, options: PruneOptions, encoding: Encoding, encoded: Encoded) -> DecisionResult:
    kept, rows = prune(encoding, options), encoded.rows
    seconds = {"encode": encoded.seconds, "spectrum": kept.spectrum_seconds, "select": kept.select_seconds}
    if request.explain:
        spectrum = encoding.spectrum(options.scope)
        explanation = Explanation(spectrum.curve(), spectrum.thresholds, list(encoding.layout.grids))
        return DecisionResult(kept, rows[:0].cpu(), seconds, explanation)
    rows = rows[kept.placeholders].cpu()
    if not finite(rows):
        raise NonFiniteFeaturesError(f"features of this image are too large for {rows.dtype}")
    return DecisionResult(kept, rows, seconds)


def _data(request: DecisionRequest) -> Mapping[str, Any]:
    data: Mapping[str, Any] = request.item.get_data()
    return data
