"""A simulated accelerator: a plugin of vLLM for CPUs (entry point ``vllm.general_plugins``, see ``simulate.py``).

Vision tower, projector and language model take the time that the parameters say, and no core. As on a stream, work is
launched without waiting, one piece after the other; the host waits where it first reads a result. Everything else is
real: HTTP, image processing, decision requests, scheduling (with async scheduling, as on a GPU), payloads, embeddings
and decisions. Features are those of a fixed bank of pictures with falling spectra; their Gram matrices and eigenvalues
are computed beforehand, as these would be the device's work.

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = "SIMULATED_ACCELERATOR"  # the model's name and the times, as JSON
IDEAL = "SIMULATED_IDEAL"  # set if decisions take no time
WAITS = "SIMULATED_WAITS"  # set if the engine waits for each decision
VOCABULARY = 512
PICTURES = 16


@dataclass(frozen=True)
class Times:
    """What a device takes, in milliseconds. Estimates for bfloat16 on one H100 SXM (989 TFLOP/s, 3.35 TB/s).

    Attributes:
        image: the vision tower and projector, per image.
        batch: the same, per batch.
        launch: of the host, to launch the tower on a batch (24 or 32 layers of a dozen kernels, 7 us each).
        token: the language model, per token of a step (at half of the peak).
        step: the least time of a step (all weights are read, and a bit).
        eigenvalues: of one Gram matrix, one after the other (cuSOLVER's syevd is no batched routine at these sizes).
        gram: of one Gram matrix.
        copy: of 1 MB from the device to the host (PCIe 5, 25 GB/s and a launch).
    """

    image: float
    token: float
    step: float
    eigenvalues: float
    batch: float = 0.5
    launch: float = 2.0
    gram: float = 0.03
    copy: float = 0.05

    def slower(self, factor: float) -> "Times":
        """A device that takes ``factor`` times as long for everything."""
        return Times(**{name: value * factor for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Model:
    """A model, and the shapes of one image.

    Attributes:
        times: of an H100.
        tokens: of an image, without pruning.
        features: numbers per token that decisions use.
        hidden: width of the language model.
        side: of the image, in pixels.
    """

    times: Times
    tokens: int
    features: int
    hidden: int
    side: int


MODELS = {
    # CLIP-L/14-336: 0.35 TFLOP at 15 % of the peak; a language model of 6.7B parameters.
    "llava": Model(Times(image=2.4, token=0.027, step=5.0, eigenvalues=4.0), 576, 1024, 4096, 336),
    # A tower of 0.63B parameters on 4096 patches: 5.2 TFLOP at 30 % of the peak; a language model of 7.6B parameters.
    "qwen": Model(Times(image=18.0, token=0.031, step=5.5, eigenvalues=9.0), 1024, 3584, 3584, 896),
}


class Stream:
    """Work that runs in order."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def launch(self, milliseconds: float) -> float:
        """Queue work, behind all that is queued; returns when it will be done."""
        self._free_at = max(self._free_at, time.monotonic()) + milliseconds / 1000
        return self._free_at

    def done_at(self) -> float:
        """When all that was launched will be done."""
        return self._free_at


def wait(until: float) -> None:
    """Wait for the device, without using a core."""
    time.sleep(max(until - time.monotonic(), 0))


def announce(folder: Path, name: str, target: str) -> None:
    """Make a plugin of vLLM found by processes that have this folder among their paths.

    Args:
        folder: gets the metadata of a package.
        name: of the plugin.
        target: its function, as ``module:function``.
    """
    info = folder / f"{name}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {target}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")


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
        parameters = json.loads(os.environ[ENVIRONMENT])
        simulate(parameters["model"], Times(**parameters["times"]))
        return load(worker, *args, **kwargs)

    CPUWorker.load_model = load_model


def overlap_decisions() -> None:
    """Have the plugin take this device for one on which decisions overlap with steps, in whatever has loaded it."""
    overlap: Any = import_module("eadaprune_vllm.overlap")
    original, batches = overlap.batches_in_flight, 1 if WAITS in os.environ else overlap.ON_GPU
    for module in [*sys.modules.values()]:
        if getattr(module, "batches_in_flight", None) is original:
            vars(module)["batches_in_flight"] = lambda: batches


def simulate(name: str, times: Times) -> None:
    """Replace tower, projector, language model, and the places where the host reads what they make."""
    import torch
    from vllm.model_executor.models import clip, llava, qwen2_5_vl
    from vllm.v1.worker import gpu_model_runner

    stream, bank = Stream(), Bank(MODELS[name])
    zeros = torch.zeros(1 << 14, MODELS[name].hidden, dtype=torch.bfloat16)
    logits = torch.zeros(1 << 10, VOCABULARY)

    def encode(pixels: list[Any]) -> list[int]:
        """Which pictures these are; each has its pixels as one row."""
        time.sleep(times.launch / 1000)
        stream.launch(times.batch + times.image * len(pixels))
        return [bank.pick(each) for each in pixels]

    def clip_tower(self: Any, pixel_values: Any, **_: Any) -> Any:
        return bank.features[encode(list(pixel_values))]

    def project(self: Any, features: Any) -> Any:
        return [bank.embeds[bank.number(each)] for each in features]

    def qwen_tower(self: Any, pixels: Any, grid_thw: list[list[int]]) -> Any:
        patches = [frames * height * width for frames, height, width in grid_thw]
        pictures = encode(pixels.split(patches))
        return torch.cat([bank.of_size(one, count // 4) for one, count in zip(pictures, patches, strict=True)])

    def embed_input_ids(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return zeros[: len(input_ids)]

    def forward(self: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        count = len(embeds if embeds is not None else input_ids)
        stream.launch(max(times.step, times.token * count))
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

    clip.CLIPVisionModel.forward = clip_tower
    llava.LlavaMultiModalProjector.forward = project
    qwen2_5_vl.Qwen2_5_VisionTransformer.forward = qwen_tower
    for model in (llava.LlavaForConditionalGeneration, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
        model.embed_input_ids = embed_input_ids
        model.compute_logits = lambda self, hidden: logits[: len(hidden)]
    gpu_model_runner.GPUModelRunner._model_forward = forward
    gpu_model_runner.GPUModelRunner._get_or_create_async_output_copy_stream = lambda self: None
    gpu_model_runner.AsyncGPUModelRunnerOutput = Output
    if "eadaprune" in os.environ["VLLM_PLUGINS"]:
        simulate_decisions(times, stream, bank)
    if IDEAL in os.environ:
        idealize(times, stream, bank)


class Bank:
    """Features of pictures, and what the device would compute of them.

    Attributes:
        model: with the shapes.
        features: ``[PICTURES, tokens, features]`` bfloat16.
        embeds: ``[PICTURES, tokens, hidden]`` bfloat16.
    """

    def __init__(self, model: Model) -> None:
        import torch

        self.model = model
        generator = torch.Generator().manual_seed(0)
        found = []
        for number in range(PICTURES):
            left = torch.linalg.qr(torch.randn(model.tokens, model.tokens, generator=generator)).Q
            right = torch.linalg.qr(torch.randn(model.features, model.tokens, generator=generator)).Q
            falling = torch.arange(1, model.tokens + 1).float() ** -(0.7 + 0.05 * number)
            noise = 0.02 * torch.randn(model.tokens, model.features, generator=generator)
            found.append((left * falling) @ right.T * 20 + noise)
            found[-1][0, 0] = number + 1  # by which a picture is known
        self.features = torch.stack(found).bfloat16()
        self.embeds = self.features.repeat(1, 1, model.hidden // model.features)
        wide = self.features.float()
        self.grams = wide @ wide.transpose(1, 2)
        self.eigenvalues = torch.linalg.eigvalsh(self.grams)
        self._by_trace = {float(gram[1, 1]): number for number, gram in enumerate(self.grams)}

    def pick(self, pixels: Any) -> int:
        """The picture that pixels stand for."""
        return int(pixels.flatten()[::1499].float().sum().abs() * 1000) % PICTURES

    def of_size(self, number: int, tokens: int) -> Any:
        """Embeddings of a picture, as of an image with so many tokens, ``[tokens, hidden]``."""
        times = -(-tokens // self.model.tokens)
        return self.embeds[number].repeat(times, 1)[:tokens]

    def number(self, features: Any) -> int:
        """Which picture these are."""
        return int(features[0, 0]) - 1

    def number_of_gram(self, gram: Any) -> int:
        """Whose Gram matrix it is."""
        return self._by_trace[float(gram[1, 1])]


def simulate_decisions(times: Times, stream: Stream, bank: Bank) -> None:
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
        if features.shape != bank.features[0].shape:
            return features @ features.T
        device.launch(times.gram)
        return bank.grams[bank.number(features)]

    def finite(values: Any) -> bool:
        wait(device.done_at())
        return True

    def eigenvalues(grams: Any) -> Any:
        if grams.shape[-1] != bank.model.tokens:
            return torch.linalg.eigvalsh(grams)
        wait(device.launch(times.eigenvalues * len(grams)))
        return bank.eigenvalues[[bank.number_of_gram(each) for each in grams]]

    to_numpy = selectors.VisualTokens.token_gram_numpy.fget

    def token_gram_numpy(tokens: Any) -> Any:
        wait(device.launch(times.copy * tokens.num_tokens**2 * 4 / 1e6))
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


def idealize(times: Times, stream: Stream, bank: Bank) -> None:
    """Decisions for nothing: the tower is launched, and the engine responds at once."""
    import torch

    from eadaprune_vllm.core.options import PruneOptions
    from eadaprune_vllm.core.prune import PruneDecision
    from eadaprune_vllm.messages import DecisionResult

    worker: Any = import_module("eadaprune_vllm.engine.worker")
    real = worker.launch

    def launch(runner: Any, requests: Any, respond: bool = True) -> Any:
        if any(request.explain for request in requests):  # of the reference pictures
            return real(runner, requests, respond)
        time.sleep(times.launch / 1000)
        stream.launch(times.batch + times.image * len(requests))
        found = []
        for request in requests:
            kept = PruneOptions.model_validate_json(request.options).max_tokens or bank.model.tokens
            indices = torch.arange(kept)
            decision = PruneDecision(indices, indices, bank.model.tokens, 0, None, None, "max_tokens", "span")
            seconds = {"encode": 0.0, "spectrum": 0.0, "select": 0.0}
            found.append(DecisionResult(decision, bank.embeds[0, :kept], seconds))
        return lambda: found

    worker.launch = launch
