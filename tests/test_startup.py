"""What the checks of a configuration say, on real configurations of vLLM."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from harness import environment
from shared import Reference
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from eadaprune_vllm import startup
from eadaprune_vllm.errors import NonFiniteFeaturesError, StartupError
from eadaprune_vllm.flags import apply_flags
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.options import PruneOptions


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit_mm_per_prompt": {"image": 0}}, "so there is nothing to prune"),
        ({"language_model_only": True}, "so there is nothing to prune"),
        ({"model_impl": "transformers"}, "the architecture TransformersMultiModalForCausalLM is not supported"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate is vLLM's own"),
        ({"mm_encoder_only": True}, "--mm-encoder-only is not supported"),
        ({"mm_encoder_attn_backend": "TORCH_SDPA"}, "--mm-encoder-attn-backend is not supported"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder is not supported"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder is not supported"),
        (
            {"enable_lora": True, "enable_tower_connector_lora": True, "max_lora_rank": 8},
            "--enable-tower-connector-lora is not supported",
        ),
    ],
)
def test_flags_that_cannot_be_honoured(model: Path, settings: dict[str, Any], words: str) -> None:
    config = EngineArgs(str(model), max_model_len=1024, **settings).create_engine_config()
    with pytest.raises(StartupError, match=words):
        startup.check(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data is not supported"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate is vLLM's own"),
        ({"media_io_kwargs": {"video": {"backend": "torchcodec", "device": "cuda"}}}, "decoding videos on the GPU"),
        ({"media_io_kwargs": {"video": {"backend": "pynvvideocodec"}}}, "decoding videos on the GPU"),
    ],
)
def test_flags_of_vllms_own_encoder_cannot_be_honoured(
    family: Callable[[str], Path], settings: dict[str, Any], words: str
) -> None:
    config = EngineArgs(str(family("qwen2_5_vl")), max_model_len=1024, **settings).create_engine_config()
    with pytest.raises(StartupError, match=words):
        startup.check(config)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_embeddings_that_do_not_say_where_lines_end_are_refused(family: Callable[[str], Path], name: str) -> None:
    config = EngineArgs(str(family(name)), max_model_len=1024, enable_mm_embeds=True).create_engine_config()
    with pytest.raises(StartupError, match="--enable-mm-embeds is not supported for this model"):
        startup.check(config)


def test_images_may_be_switched_off_where_there_are_videos(family: Callable[[str], Path]) -> None:
    def config(**limits: int) -> Any:
        args = EngineArgs(str(family("qwen2_5_vl")), max_model_len=1024, limit_mm_per_prompt=dict(limits))
        return args.create_engine_config()

    startup.check(config(image=0))
    startup.check(config(video=0))
    with pytest.raises(StartupError, match="images and videos are switched off"):
        startup.check(config(image=0, video=0))


def test_modelscope_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(str(model), max_model_len=1024).create_engine_config()
    startup.check(config)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(StartupError, match="ModelScope"):
        startup.check(config)


def test_a_configuration_that_was_not_checked_gets_no_front_end(model: Path) -> None:
    """As ``vllm launch render`` makes one: it drops the flags that say where the weights are."""
    config = EngineArgs(str(model), max_model_len=1024).create_engine_config()
    with pytest.raises(StartupError, match="not vllm launch render"):
        startup.front_end(config)


def test_kv_bytes_per_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype that vLLM knows, one that a platform brings, and one whose size nobody knows."""
    config = EngineArgs(str(model), max_model_len=1024, dtype="bfloat16").create_engine_config()
    monkeypatch.setitem(STR_DTYPE_TO_TORCH_DTYPE, "of_a_platform", torch.int8)
    bytes_of = {}
    for name in (*get_args(CacheDType), "of_a_platform", "unknown"):
        config.cache_config.cache_dtype = name
        bytes_of[name] = startup.kv_bytes_per_token(config)
    numbers = 2 * 2 * 2 * 32  # key and value x layers x KV heads x head size
    assert bytes_of["auto"] == bytes_of["float16"] == 2 * numbers
    assert bytes_of["fp8"] == bytes_of["of_a_platform"] == numbers
    assert [name for name, size in bytes_of.items() if not size] == ["unknown"]


@pytest.fixture(scope="module")
def front_end(model: Path) -> FrontEnd:
    encoder = Reference(model, torch.float16).encoder
    return FrontEnd(encoder, torch.float16, Metrics(), "m", kv_bytes_per_token=1)


def test_load_aware_thresholds_are_refused_where_they_cannot_work() -> None:
    def refusal(serving: bool = True, **flags: bool) -> str:
        args = argparse.Namespace(**({"disable_log_stats": False, "enable_elastic_ep": False} | flags))
        with pytest.raises(StartupError) as refused:
            startup.check_load_aware(serving, args)
        return str(refused.value)

    assert "works in vllm serve only" in refusal(serving=False)
    assert "--disable-log-stats" in refusal(disable_log_stats=True)
    assert "--enable-elastic-ep" in refusal(enable_elastic_ep=True)


def test_rows_are_in_the_models_dtype(front_end: FrontEnd) -> None:
    rows, kept, _ = front_end.prune({"pixel_values": torch.randn(1, 3, 336, 336)}, PruneOptions(energy=0.9))
    assert rows.dtype == torch.float16
    assert rows.shape == (len(kept), 256)


def test_rows_that_overflow_the_models_dtype_are_refused(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = front_end.encoder
    weight = encoder.vision_tower.encoder.layers[-1].mlp.fc2.weight
    monkeypatch.setattr(weight, "data", weight * 1e6)
    with pytest.raises(NonFiniteFeaturesError, match=r"too large for torch\.float16"):
        front_end.prune({"pixel_values": torch.ones(1, 3, 336, 336)}, PruneOptions())


def test_concurrent_callers_get_what_each_would_get_alone(front_end: FrontEnd) -> None:
    scenes = [torch.randn(1, 3, 336, 336) * scale for scale in (0.1, 0.5, 1, 2) for _ in range(6)]

    def kept(pixels: torch.Tensor) -> list[int]:
        return front_end.prune({"pixel_values": pixels}, PruneOptions(energy=0.97))[1].indices.tolist()

    alone = [kept(pixels) for pixels in scenes]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(kept, scenes)) == alone


NAMESPACE = """
import argparse, sys
from vllm.engine.arg_utils import EngineArgs
for _ in range(2):
    args = argparse.Namespace(model=sys.argv[1])
    assert EngineArgs.from_cli_args(args).model == sys.argv[1]
print("fine")
"""


def test_merely_installed_it_leaves_other_callers_of_vllm_alone(model: Path) -> None:
    """A program of its own may build engine arguments from a namespace that knows nothing of our flags."""
    found = subprocess.run(
        [sys.executable, "-c", NAMESPACE, str(model)], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert found.stdout.endswith("fine\n"), found.stderr[-2000:]


SUPERVISOR = """
import sys
import vllm.entrypoints.cli.serve as serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = serve.make_arg_parser(FlexibleArgumentParser())
args = parser.parse_args(["--plugin", "eadaprune", "--eadaprune-energy", "0.9", "--port", "18000",
    "--data-parallel-multi-port-external-lb", "--data-parallel-size", "2", "--data-parallel-size-local", "2"])
from vllm.entrypoints.launchers.dp_supervisor import DPSupervisor
try:
    DPSupervisor(args)
finally:
    import os
    print(os.environ.get("VLLM_PLUGINS"), args.mm_processor_kwargs)
"""


def test_the_data_parallel_supervisor_hands_plugin_and_options_to_its_children() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SUPERVISOR], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert "eadaprune,lora" in found.stdout, found.stderr[-2000:]
    assert "{'eadaprune': {'energy': 0.9}}" in found.stdout


@pytest.mark.parametrize("given", [0.5, [], "x"])
def test_server_options_that_are_no_object_are_refused_beside_flags(
    given: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "eadaprune")
    args = argparse.Namespace(mm_processor_kwargs={"eadaprune": given}, eadaprune_energy=0.9)
    apply_flags(args)
    with pytest.raises(StartupError, match="is not an object"):
        startup.server_options(args.mm_processor_kwargs["eadaprune"])
