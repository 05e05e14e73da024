"""Where the tower runs: what is refused, what the engine is told to leave it, when it moves, and that it can."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, There, elsewhere
from families import FAMILIES
from inprocess import SCENES
from prometheus_client import CollectorRegistry
from shared import encoder
from transformers import AutoImageProcessor
from vllm.engine.arg_utils import EngineArgs

from eadaprune_vllm import device, endpoint, front_end, startup
from eadaprune_vllm.encoder import PackedLinear, compute_dtype
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.options import PruneOptions, ServerOptions
from eadaprune_vllm.prune import Encoding, prune
from eadaprune_vllm.selectors import VisualTokens

GPU = torch.device("cuda:0")
GIB = 2**30


def tensors(encoding: Encoding) -> dict[str, torch.Tensor | None]:
    found = {"part": encoding.part, "rows": encoding.rows, **vars(encoding.tokens)}
    return found | (dataclasses.asdict(encoding.newlines) if encoding.newlines else {})


def assert_same(one: Encoding, other: Encoding) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        found = right[name]
        if value is None or found is None:
            assert value is found, name
        else:
            assert type(found) in (torch.Tensor, torch.nn.Parameter), name
            assert torch.equal(found, value), name
    assert (one.grids, one.extent) == (other.grids, other.extent)


def inputs_of(folder: Path, scene: str) -> Any:
    if scene == "video" and "Llava" in (folder / "config.json").read_text():
        return {"pixel_values_videos": torch.randn(1, 3, 3, 112, 112)}
    if scene == "video":
        patch = encoder(folder).hf_config.vision_config.patch_size
        return {
            "pixel_values_videos": torch.randn(2 * 8 * 12, 3 * 2 * patch**2),
            "video_grid_thw": torch.tensor([[2, 8, 12]]),
            "second_per_grid_ts": [0.5],
        }
    return AutoImageProcessor.from_pretrained(folder)(SCENES[scene], return_tensors="pt")


CASES = [(name, scene) for name in FAMILIES for scene in ("wide", "small")]
CASES += [(name, "video") for name in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")]


@pytest.mark.parametrize(("name", "scene"), CASES)
def test_the_way_to_a_device_and_back_changes_nothing(family: Callable[[str], Path], name: str, scene: str) -> None:
    """And there nothing is mixed with the CPU, and little is waited for."""
    inputs, found = inputs_of(family(name), scene), encoder(family(name), torch.float32)
    here = found.encode(inputs)
    assert_same(here, found(inputs))
    with elsewhere(found) as waits:
        assert found.device == DEVICE
        there = found(inputs)
    assert_same(here, there)
    # Its tensors are fetched at the end. What comes before is for the image, not for every block.
    fetched = sum(tensor is not None for tensor in tensors(here).values())
    assert waits.total() - fetched <= 6, waits


def test_the_device_for_tests_is_like_one() -> None:
    with elsewhere(torch.nn.Linear(2, 2)) as waits, torch.device(DEVICE):
        made, index = torch.tensor([1.0, 2.0]), torch.tensor([0], device="cpu")
        assert isinstance(made, There)
        assert isinstance(made[index] + 1, There)
        with pytest.raises(RuntimeError, match="two devices"):
            made + torch.ones(2, device="cpu")
        assert not waits
        assert made.tolist() == made.cpu().tolist() == [1, 2]
        assert waits.total() == 2


def cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    cuda(monkeypatch, 2)
    for platform, auto in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(current_platform, "is_cuda", lambda platform=platform: platform)
        found = [str(device.resolve(option)) for option in ("auto", "cpu", "cuda", "cuda:1")]
        assert found == [auto, "cpu", "cuda:0", "cuda:1"]


def test_devices_that_are_not_there_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 2)
    with pytest.raises(StartupError, match=r"^eadaprune: --eadaprune-device cuda:2: there is no such GPU; .* finds 2$"):
        device.resolve("cuda:2")
    cuda(monkeypatch, 0)
    with pytest.raises(StartupError, match="finds 0"):
        device.resolve("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(StartupError, match=r"^eadaprune: --eadaprune-device cuda: this PyTorch has no CUDA$"):
        device.resolve("cuda")


def test_on_a_gpu_the_tower_computes_in_the_models_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert compute_dtype(dtype, GPU) == dtype


def test_what_the_engine_leaves_its_front_ends() -> None:
    assert device.room(weights=GIB, front_ends=1) == 3.5
    assert device.room(weights=3 * GIB // 2, front_ends=4) == 16
    assert device.room(weights=1, front_ends=1) == 2.51  # never less than it takes
    assert device.limit(device.room(GIB, 4), 4) == 3 * GIB  # weights and activations; the context is not torch's
    device.check_room(3.01, GIB, 2)
    with pytest.raises(StartupError, match=r"--mm-ipc-gpu-memory-gb 2\.9 is too little .* 2 front end\(s\) .* than 3;"):
        device.check_room(2.9, GIB, 2)


@pytest.fixture
def config(model: Path) -> Any:
    return EngineArgs(str(model), max_model_len=1024, dtype="float16").create_engine_config()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's part, of an engine that has a GPU."""
    cuda(monkeypatch, 1)
    monkeypatch.setattr(device, "is_engines", lambda where: where.type == "cuda")
    monkeypatch.setattr(startup, "_metrics", lambda: Metrics(CollectorRegistry()))


def configured(config: Any, option: str = "cuda", tower: bool = True) -> float:
    startup.configure(config, ServerOptions(device=option), tower)
    return float(config.model_config.multimodal_config.mm_ipc_gpu_memory_gb)


@pytest.mark.usefixtures("on_gpu")
def test_the_engine_is_told_to_leave_room(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights = sum(weight.nbytes for weight in encoder(Path(config.model_config.model), torch.float16).parameters())
    assert configured(config, "cpu") == 0
    assert configured(config, tower=False) == 0  # a node without front ends
    config.parallel_config._api_process_count = 3
    caplog.clear()
    assert configured(config) == device.room(weights, 3) > 7.5
    assert not caplog.messages  # a front end's: it is for the server to say
    config.model_config.multimodal_config.mm_ipc_gpu_memory_gb = 0
    config.parallel_config._api_process_rank = -1
    configured(config)
    (said,) = caplog.messages
    assert "on cuda:0: 7." in said
    assert "3 front end(s)" in said


@pytest.mark.usefixtures("on_gpu")
def test_the_operators_own_room_stays(config: Any) -> None:
    config.model_config.multimodal_config.mm_ipc_gpu_memory_gb = 1.25
    assert configured(config) == 1.25
    assert startup.front_end(config).gpu_bytes == 0.75 * GIB
    config.model_config.multimodal_config.mm_ipc_gpu_memory_gb = 0.4
    with pytest.raises(StartupError, match=r"0\.4 is too little"):
        configured(config)


@pytest.mark.usefixtures("on_gpu")
def test_the_tower_is_loaded_on_the_cpu(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(config)
    found = startup.front_end(config)
    assert (found.encoder.device, found.encoder.dtype, found.device) == (device.CPU, torch.float16, GPU)
    assert found.gpu_bytes
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is here too
    assert startup.front_end(config).gpu_bytes is None
    configured(config, "cpu")
    found = startup.front_end(config)
    assert (found.encoder.dtype, found.device, found.gpu_bytes) == (torch.float32, device.CPU, None)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def test_weights_that_will_move_are_not_laid_out_for_the_cpu(model: Path) -> None:
    assert not any(isinstance(module, PackedLinear) for module in encoder(model, device=GPU).modules())


class FakeEncoder:
    """Writes down what is done with it."""

    def __init__(self, done: list[str]) -> None:
        self.done, self.device = done, device.CPU

    def to(self, where: torch.device) -> None:
        self.done.append(f"to {where}")
        self.device = where

    @contextmanager
    def threads(self) -> Iterator[None]:
        yield

    def __call__(self, inputs: Any) -> Encoding:
        self.done.append(f"on {self.device}")
        return Encoding(VisualTokens(torch.randn(4, 8), None), torch.zeros(4, dtype=torch.int64), ((2, 2),))


Moving = tuple[FrontEnd, list[str]]


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Moving:
    done: list[str] = []
    monkeypatch.setattr(front_end, "prepare", lambda where, most: done.append(f"at most {most}"))
    fake: Any = FakeEncoder(done)
    return FrontEnd(fake, torch.float32, Metrics(CollectorRegistry()), "m", 1, device=GPU, gpu_bytes=7), done


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(1, 3, 2, 2)}


MOVED = ["at most 7", "to cuda:0"]


def test_a_server_moves_the_tower_when_the_engine_is_ready(moving: Moving) -> None:
    found, done = moving
    found.warm_up(pixels())
    assert done == ["on cpu"]
    processor = SimpleNamespace(front_end=found, warm_up=lambda: found.warm_up(pixels()))
    for _ in range(2):
        endpoint._place(processor)
    # The image is encoded again: on the CPU its budget may have been another.
    assert done[1:] == [*MOVED, "on cuda:0"]
    found.prune(pixels() | {"other": torch.ones(1)}, PruneOptions())
    assert done[4:] == ["on cuda:0"]


def test_without_a_server_it_moves_before_the_first_image(moving: Moving) -> None:
    found, done = moving
    found.warm_up(pixels())
    found.prune(pixels(), PruneOptions())
    found.preview(pixels(), PruneOptions())
    assert done == ["on cpu", *MOVED, "on cuda:0"]


def test_a_preview_moves_it_too(moving: Moving) -> None:
    found, done = moving
    found.preview(pixels(), PruneOptions())
    assert done == [*MOVED, "on cuda:0"]


def test_on_the_cpu_nothing_moves() -> None:
    done: list[str] = []
    fake: Any = FakeEncoder(done)
    found = FrontEnd(fake, torch.float32, Metrics(CollectorRegistry()), "m", 1)
    assert not found.place()
    found.prune(pixels(), PruneOptions())
    assert done == ["on cpu"]


def test_torch_is_held_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Any] = []
    for name in ("deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *share: shares.append(share))
    device.prepare(GPU, 4 * GIB)
    device.prepare(GPU, 100 * GIB)
    device.prepare(GPU, None)
    assert shares == [(0.05, GPU), (1, GPU)]
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "scene"), CASES)
def test_a_gpu_decides_as_the_cpu_does(family: Callable[[str], Path], name: str, scene: str) -> None:
    inputs = inputs_of(family(name), scene)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        here = encoder(family(name), dtype)(inputs)
        device.prepare(GPU, None)
        found = encoder(family(name), dtype, device=GPU).to(GPU)
        there = found(inputs)
        assert there.tokens.features.device == device.CPU
        torch.testing.assert_close(there.tokens.features, here.tokens.features, atol=tolerance, rtol=tolerance)
        assert_same(there, found(inputs))  # the same every time
        for energy in (0.9, 0.99):
            options = PruneOptions(energy=energy, min_tokens=1)
            one, other = len(prune(here, options)), len(prune(there, options))
            assert abs(one - other) <= (0 if dtype == torch.float32 else max(2, one // 20))


@pytest.mark.gpu
def test_nothing_is_left_on_the_gpu(family: Callable[[str], Path]) -> None:
    found = encoder(family("llava_onevision"), device=GPU).to(GPU)
    inputs = inputs_of(family("llava_onevision"), "wide")
    found(inputs)
    before = torch.cuda.memory_allocated(GPU)
    encodings = [found(inputs) for _ in range(3)]
    assert torch.cuda.memory_allocated(GPU) == before
    assert all(tensor is None or tensor.device == device.CPU for each in encodings for tensor in tensors(each).values())
