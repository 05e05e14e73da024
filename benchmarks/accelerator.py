"""A simulated accelerator: a plugin of vLLM for CPUs (entry point ``vllm.general_plugins``, see ``simulate.py``).

Vision tower, projector and language model take the time that the parameters say, and no core. As on a stream, work is
launched without waiting, one piece after the other; the host waits where it first reads a result. Everything else is
real: HTTP, image processing, decision requests, scheduling (with async scheduling, as on a GPU), payloads, embeddings
and decisions. Features are those of a fixed bank of pictures with falling spectra, 576 x 1024; their Gram matrices and
eigenvalues are computed beforehand, as these would be the device's work.

It is a model, and no measurement of any GPU.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = "SIMULATED_ACCELERATOR"  # the parameters as JSON
IDEAL = "SIMULATED_IDEAL"  # set if decisions take no time
WAITS = "SIMULATED_WAITS"  # set if the engine waits for each decision
VOCABULARY = 512
PICTURES, TOKENS, FEATURES, HIDDEN = 16, 576, 1024, 4096


@dataclass(frozen=True)
class Rates:
    """Times of the device, in milliseconds. The defaults are estimates for LLaVA-1.5-7B in bfloat16 on one H100 SXM.

    Attributes:
        image: the vision tower and projector, per image (CLIP-L/14-336: 0.35 TFLOP, at 15 % of 989 TFLOP/s).
        batch: the same, per batch.
        token: the language model, per token of a step (13.4 GFLOP, at half of 989 TFLOP/s).
        step: the least time of a step (13.5 GB of weights, at 3.35 TB/s and a bit).
        eigenvalues: of one 576 x 576 matrix, one after the other (cuSOLVER's syevd is no batched routine at this size).
        gram: of one Gram matrix.
        copy: of 1 MB from the device to the host (PCIe 5, 25 GB/s and a launch).
    """

    image: float = 2.4
    batch: float = 0.5
    token: float = 0.027
    step: float = 5.0
    eigenvalues: float = 4.0
    gram: float = 0.03
    copy: float = 0.05

    def slower(self, factor: float) -> "Rates":
        """A device that takes ``factor`` times as long for everything."""
        return Rates(**{name: value * factor for name, value in asdict(self).items()})


class Stream:
    """Work that runs in order."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def launch(self, milliseconds: float, after: float = 0.0) -> float:
        """Queue work, behind all that is queued and not before ``after``; returns when it will be done."""
        self._free_at = max(self._free_at, after, time.monotonic()) + milliseconds / 1000
        return self._free_at

    def done_at(self) -> float:
        """When all that was launched will be done."""
        return self._free_at


def wait(until: float) -> None:
    """Wait for the device, without using a core."""
    time.sleep(max(until - time.monotonic(), 0))


def register() -> None:
    """Entry point: vLLM calls it in every process."""
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        # vLLM needs no async scheduling on CPUs and switches it off; on GPUs it is the default.
        asynchronous = vllm_config.scheduler_config.async_scheduling
        configure(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    if "eadaprune" in os.environ["VLLM_PLUGINS"]:
        overlap_decisions()
    from vllm.v1.worker.cpu_worker import CPUWorker

    load = CPUWorker.load_model

    def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        simulate(Rates(**json.loads(os.environ[ENVIRONMENT])))
        return load(worker, *args, **kwargs)

    CPUWorker.load_model = load_model


def overlap_decisions() -> None:
    """Have the plugin take this device for one on which decisions overlap with steps, in whatever has loaded it."""
    overlap: Any = import_module("eadaprune_vllm.overlap")
    original, batches = overlap.batches_in_flight, 1 if WAITS in os.environ else overlap.ON_GPU
    for module in [*sys.modules.values()]:
        if getattr(module, "batches_in_flight", None) is original:
            vars(module)["batches_in_flight"] = lambda: batches


def simulate(rates: Rates) -> None:
    """Replace tower, projector, language model, and the places where the host reads what they make."""
    import torch
    from vllm.model_executor.models import clip, llava
    from vllm.v1.worker import gpu_model_runner

    stream, bank = Stream(), Bank()
    zeros = torch.zeros(1 << 14, HIDDEN, dtype=torch.bfloat16)
    logits = torch.zeros(1 << 10, VOCABULARY)

    def tower(self: Any, pixel_values: Any, **_: Any) -> Any:
        stream.launch(rates.batch + rates.image * len(pixel_values))
        return bank.features(pixel_values)

    def project(self: Any, features: Any) -> Any:
        return [bank.embeds[bank.number(each)] for each in features]

    def embed_input_ids(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return zeros[: len(input_ids)]

    def forward(self: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        count = len(embeds if embeds is not None else input_ids)
        stream.launch(max(rates.step, rates.token * count))
        return zeros[:count]

    class Output(gpu_model_runner.AsyncGPUModelRunnerOutput):  # type: ignore[misc]
        def __init__(
            self, model_runner_output: Any, sampled_token_ids: Any, invalid_req_indices: Any, vocab_size: int, **_: Any
        ) -> None:
            self._model_runner_output = model_runner_output
            self._invalid_req_indices = invalid_req_indices
            self._sampled_token_ids = self.sampled_token_ids_cpu = sampled_token_ids
            self._logprobs_tensors = self._logprobs_tensors_cpu = self._num_nans = self._num_nans_cpu = None
            self._has_fault = None
            self.vocab_size = vocab_size
            done_at = stream.done_at()
            self.async_copy_ready_event = SimpleNamespace(synchronize=lambda: wait(done_at))

    clip.CLIPVisionModel.forward = tower
    llava.LlavaMultiModalProjector.forward = project
    llava.LlavaForConditionalGeneration.embed_input_ids = embed_input_ids
    llava.LlavaForConditionalGeneration.compute_logits = lambda self, hidden: logits[: len(hidden)]
    gpu_model_runner.GPUModelRunner._model_forward = forward
    gpu_model_runner.GPUModelRunner._get_or_create_async_output_copy_stream = lambda self: None
    gpu_model_runner.AsyncGPUModelRunnerOutput = Output
    if "eadaprune" in os.environ["VLLM_PLUGINS"]:
        simulate_decisions(rates, stream, bank)
    if IDEAL in os.environ:
        idealize(rates, stream, bank)


class Bank:
    """Features of pictures, and what the device would compute of them.

    Attributes:
        embeds: ``[PICTURES, TOKENS, HIDDEN]`` bfloat16.
    """

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        found = []
        for number in range(PICTURES):
            left = torch.linalg.qr(torch.randn(TOKENS, TOKENS, generator=generator)).Q
            right = torch.linalg.qr(torch.randn(FEATURES, TOKENS, generator=generator)).Q
            falling = torch.arange(1, TOKENS + 1).float() ** -(0.7 + 0.05 * number)
            noise = 0.02 * torch.randn(TOKENS, FEATURES, generator=generator)
            found.append((left * falling) @ right.T * 20 + noise)
            found[-1][0, 0] = number + 1  # by which a picture is known
        self._features = torch.stack(found).bfloat16()
        self.embeds = self._features.repeat(1, 1, HIDDEN // FEATURES)
        wide = self._features.float()
        self.grams = wide @ wide.transpose(1, 2)
        for number in range(PICTURES):
            self.grams[number, 0, 1] = self.grams[number, 1, 0] = self.grams[number, 0, 1]
        self.eigenvalues = torch.linalg.eigvalsh(self.grams)
        self._by_trace = {float(gram.diagonal()[1]): number for number, gram in enumerate(self.grams)}

    def features(self, pixel_values: Any) -> Any:
        """Those of the pictures that pixels stand for."""
        sums = pixel_values[:, 0, ::37, ::41].float().sum((1, 2)).abs()
        return self._features[(sums * 1000).long() % PICTURES]

    def number(self, features: Any) -> int:
        """Which picture these are."""
        return int(features[0, 0]) - 1

    def number_of_gram(self, gram: Any) -> int:
        """Whose Gram matrix it is."""
        return self._by_trace[float(gram[1, 1])]


def simulate_decisions(rates: Rates, stream: Stream, bank: Bank) -> None:
    """What a decision computes on the device, and where it waits for it: on a stream of its own, or if ``WAITS`` is set
    on the engine's, by the engine's thread, as before decisions had a thread."""
    import torch

    from eadaprune_vllm.core import prune, spectrum
    from eadaprune_vllm.engine import decide
    from eadaprune_vllm.engine import device as real

    selectors: Any = import_module("eadaprune_vllm.core.selectors")
    device = stream if WAITS in os.environ else Stream()

    class Stopwatch(real.Stopwatch):
        @staticmethod
        def _point(device: Any) -> float:
            return stream.launch(0)

        def seconds(self) -> float:
            wait(self.end)
            return float(self.end - self.start)

    @contextmanager
    def beside_engine(launched: Stopwatch) -> Iterator[None]:
        wait(launched.end)
        yield

    def gram(features: Any) -> Any:
        if features.shape != (TOKENS, FEATURES):
            return features @ features.T
        device.launch(rates.gram)
        return bank.grams[bank.number(features)]

    def finite(values: Any) -> bool:
        wait(device.done_at())
        return True

    def eigenvalues(grams: Any) -> Any:
        if grams.shape[-1] != TOKENS:
            return torch.linalg.eigvalsh(grams)
        wait(device.launch(rates.eigenvalues * len(grams)))
        return bank.eigenvalues[[bank.number_of_gram(each) for each in grams]]

    to_numpy = selectors.VisualTokens.token_gram_numpy.fget

    def token_gram_numpy(tokens: Any) -> Any:
        wait(device.launch(rates.copy * tokens.num_tokens**2 * 4 / 1e6))
        return to_numpy(tokens)

    replaced: list[tuple[Any, str, Any]] = [
        (decide, "Stopwatch", Stopwatch),
        (decide, "beside_engine", beside_engine),
        (selectors, "_gram", gram),
        (prune, "finite", finite),
        (decide, "finite", finite),
        (spectrum, "torch", SimpleNamespace(**{**vars(torch), "linalg": SimpleNamespace(eigvalsh=eigenvalues)})),
        (selectors.VisualTokens, "token_gram_numpy", property(token_gram_numpy)),
    ]
    for owner, name, own in replaced:
        setattr(owner, name, own)


def idealize(rates: Rates, stream: Stream, bank: Bank) -> None:
    """Decisions for nothing: the tower is launched, and the engine responds at once."""
    import torch

    from eadaprune_vllm.core.layout import Layout
    from eadaprune_vllm.core.options import PruneOptions
    from eadaprune_vllm.core.prune import PruneDecision
    from eadaprune_vllm.messages import DecisionResult

    worker: Any = import_module("eadaprune_vllm.engine.worker")
    real = worker.launch

    def launch(runner: Any, requests: Any, respond: bool = True) -> Any:
        if any(request.explain for request in requests):  # of the reference pictures
            return real(runner, requests, respond)
        stream.launch(rates.batch + rates.image * len(requests))
        found = []
        for request in requests:
            kept = PruneOptions.model_validate_json(request.options).max_tokens or TOKENS
            indices = torch.arange(kept)
            placeholders = Layout.whole(24, 24).placeholders(indices)
            decision = PruneDecision(indices, placeholders, TOKENS, 0, None, None, "max_tokens", "span")
            seconds = {"encode": 0.0, "spectrum": 0.0, "select": 0.0}
            found.append(DecisionResult(decision, bank.embeds[0, :kept], seconds))
        return lambda: found

    worker.launch = launch
