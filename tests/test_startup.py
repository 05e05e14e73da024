"""What the checks of a configuration say, on real configurations of vLLM."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from harness import environment
from transformers import PixtralVisionConfig
from vllm.config import KVTransferConfig
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.extension import OURS
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.startup import checks, configuration, front_end
from eadaprune_vllm.startup.flags import apply_flags


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit_mm_per_prompt": {"image": 0}}, "so there is nothing to prune"),
        ({"language_model_only": True}, "so there is nothing to prune"),
        (
            {"model_impl": "transformers"},
            "vLLM serves LlavaForConditionalGeneration as TransformersMultiModalForCausalLM, which is not supported",
        ),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate is vLLM's own"),
        ({"mm_encoder_only": True}, "--mm-encoder-only without --ec-transfer-config"),
        (
            {"enable_lora": True, "enable_tower_connector_lora": True, "max_lora_rank": 8},
            "--enable-tower-connector-lora is not supported",
        ),
    ],
)
def test_unsupported_flags_are_refused(model: Path, settings: dict[str, Any], words: str) -> None:
    config = EngineArgs(str(model), max_model_len=1024, **settings).create_engine_config()
    with pytest.raises(StartupError, match=words):
        checks.check(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate is vLLM's own"),
        ({"media_io_kwargs": {"video": {"backend": "torchcodec", "device": "cuda"}}}, "decoding videos on the GPU"),
        ({"media_io_kwargs": {"video": {"backend": "pynvvideocodec"}}}, "decoding videos on the GPU"),
    ],
)
def test_unsupported_video_flags_are_refused(
    family: Callable[[str], Path], settings: dict[str, Any], words: str
) -> None:
    config = EngineArgs(str(family("qwen2_5_vl")), max_model_len=1024, **settings).create_engine_config()
    with pytest.raises(StartupError, match=words):
        checks.check(config)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "glm4v", "glm_ocr", "paddleocr_vl"])
def test_client_embeddings_without_layout_are_refused(family: Callable[[str], Path], name: str) -> None:
    config = EngineArgs(str(family(name)), max_model_len=1024, enable_mm_embeds=True).create_engine_config()
    with pytest.raises(StartupError, match="--enable-mm-embeds is not supported for this model"):
        checks.check(config)


def test_images_may_be_switched_off_where_there_are_videos(family: Callable[[str], Path]) -> None:
    def config(**limits: int) -> Any:
        args = EngineArgs(str(family("qwen2_5_vl")), max_model_len=1024, limit_mm_per_prompt=dict(limits))
        return args.create_engine_config()

    checks.check(config(image=0))
    checks.check(config(video=0))
    with pytest.raises(StartupError, match="images and videos are switched off"):
        checks.check(config(image=0, video=0))


@pytest.fixture
def config(model: Path) -> Any:
    """Of the small model, not checked yet."""
    return EngineArgs(str(model), max_model_len=1024, max_num_batched_tokens=512).create_engine_config()


@pytest.mark.parametrize(
    "settings",
    [
        {"mm_encoder_attn_backend": "TORCH_SDPA"},
        {"mm_encoder_tp_mode": "data"},
        {"compilation_config": {"compile_mm_encoder": True}},
        {"limit_mm_per_prompt": {"video": 0}},
        {"enable_mm_embeds": True},
    ],
)
def test_flags_of_vllms_encoder_work(family: Callable[[str], Path], settings: dict[str, Any]) -> None:
    checks.check(EngineArgs(str(family("qwen2_5_vl")), max_model_len=1024, **settings).create_engine_config())


def test_modelscope_models_are_left_to_vllm(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    checks.check(config)


@pytest.mark.parametrize(
    ("owner", "name", "value", "words"),
    [
        ("parallel_config", "distributed_executor_backend", "external_launcher", "external launcher"),
        ("model_config.multimodal_config", "mm_encoder_only", True, "--mm-encoder-only without --ec-transfer-config"),
    ],
)
def test_instances_without_others_are_refused(config: Any, owner: str, name: str, value: Any, words: str) -> None:
    checks.check(config)
    setattr(attrgetter(owner)(config) if owner else config, name, value)
    with pytest.raises(StartupError, match=words):
        checks.check(config)


def connected(config: Any, *names: str, trust: bool = False) -> Any:
    """The configuration with this KV connector, or with several of them."""
    several = {"connectors": [{"kv_connector": name} for name in names]} if len(names) > 1 else {}
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector" if several else names[0], kv_role="kv_both", kv_connector_extra_config=several
    )
    setattr(config.model_config.multimodal_config, KEY, ServerOptions(trust_kv_connector=trust))
    return config


@pytest.mark.parametrize(
    "names",
    [
        ["ExampleConnector"],
        ["OffloadingConnector"],
        ["LMCacheConnectorV1"],
        ["NixlConnector"],
        ["OffloadingConnector", "MooncakeStoreConnector"],
    ],
)
def test_known_connectors(config: Any, names: list[str]) -> None:
    checks.check(connected(config, *names))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["MooncakeConnector"], "the decision does not reach the instance that decodes"),
        (["OffloadingConnector", "MooncakeConnector"], "the decision does not reach the instance that decodes"),
        (["HF3FSKVConnector"], "would take one image for another"),
    ],
)
def test_other_connectors_are_refused(config: Any, names: list[str], words: str) -> None:
    for trust in (False, True):
        with pytest.raises(StartupError, match=words):
            checks.check(connected(config, *names, trust=trust))


def test_connectors_that_are_not_known_need_a_flag(config: Any) -> None:
    with pytest.raises(StartupError, match="--eadaprune-trust-kv-connector serves with it"):
        checks.check(connected(config, "OperatorsConnector"))
    checks.check(connected(config, "OperatorsConnector", trust=True))


@pytest.mark.parametrize("name", ["llava_next", "glm4v"])
def test_stores_work_where_client_embeddings_do_not(family: Callable[[str], Path], name: str) -> None:
    """vLLM switches these on by itself."""
    store = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    config = EngineArgs(str(family(name)), max_model_len=1024, kv_transfer_config=store).create_engine_config()
    assert config.model_config.multimodal_config.enable_mm_embeds
    setattr(config.model_config.multimodal_config, KEY, ServerOptions())
    checks.check(config)


def test_unknown_vision_tower_is_refused(config: Any) -> None:
    """Of a model of LLaVA's class."""
    config.model_config.hf_config.vision_config = PixtralVisionConfig()
    with pytest.raises(StartupError, match="vision tower of this model is of type 'pixtral'"):
        checks.check(config)


def test_worker_extension_works_with_any_worker(config: Any) -> None:
    configuration.configure(config, ServerOptions())
    assert config.parallel_config.worker_extension_cls == OURS
    config.parallel_config.worker_extension_cls = "some.module.Extension"
    configuration.configure(config, ServerOptions())
    once = config.parallel_config.worker_extension_cls
    assert once not in (OURS, "some.module.Extension")
    configuration.configure(config, ServerOptions())
    assert config.parallel_config.worker_extension_cls == once


def test_front_end_is_created_for_this_model(config: Any) -> None:
    configuration.configure(config, ServerOptions(load_aware=LoadPolicy()))
    found = front_end.create_front_end(config)
    assert found.decision_client.max_batch_tokens == config.scheduler_config.max_num_encoder_input_tokens >= 512
    assert found.kv_bytes_per_token == front_end.kv_bytes_per_token(config) > 0
    assert found.model_name == config.model_config.served_model_name
    assert found.load
    configuration.configure(config, ServerOptions())
    assert front_end.create_front_end(config).load is None


def test_a_configuration_that_was_not_checked_gets_no_front_end(model: Path) -> None:
    """As ``vllm launch render`` makes one: it drops the flags that say where the weights are."""
    config = EngineArgs(str(model), max_model_len=1024).create_engine_config()
    with pytest.raises(StartupError, match="not vllm launch render"):
        front_end.create_front_end(config)


def test_kv_bytes_per_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype that vLLM knows, one that a platform brings, and one whose size nobody knows."""
    config = EngineArgs(str(model), max_model_len=1024, dtype="bfloat16").create_engine_config()
    monkeypatch.setitem(STR_DTYPE_TO_TORCH_DTYPE, "of_a_platform", torch.int8)
    bytes_of = {}
    for name in (*get_args(CacheDType), "of_a_platform", "unknown"):
        config.cache_config.cache_dtype = name
        bytes_of[name] = front_end.kv_bytes_per_token(config)
    numbers = 2 * 2 * 2 * 32  # key and value x layers x KV heads x head size
    assert bytes_of["auto"] == bytes_of["float16"] == 2 * numbers
    assert bytes_of["fp8"] == bytes_of["of_a_platform"] == numbers
    assert [name for name, size in bytes_of.items() if not size] == ["unknown"]


def test_layers_without_a_kv_cache_save_none(family: Callable[[str], Path]) -> None:
    config = EngineArgs(str(family("qwen3_5")), max_model_len=1024).create_engine_config()
    assert front_end.kv_bytes_per_token(config) == 2 * 1 * 2 * 32 * 2  # key and value x layers x KV heads x head size


DEFAULTS = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(sys.argv[1])  # which loads plugins
for given in (None, {"min_tokens": 4}, {"energy": 0.9}):
    config = EngineArgs(sys.argv[1], max_model_len=1024, mm_processor_kwargs=given and {"eadaprune": given})
    options = config.create_engine_config().model_config.multimodal_config.eadaprune
    print("FOUND", options.target, options.energy, options.min_tokens)
"""


@pytest.mark.server
@pytest.mark.parametrize(
    ("name", "target"), [("glm_ocr", None), ("paddleocr_vl", None), ("glm4v", 0.33)], ids=lambda value: str(value)
)
def test_ocr_models_keep_everything_by_default(family: Callable[[str], Path], name: str, target: float | None) -> None:
    """And say so, unless the operator chose another threshold."""
    found = subprocess.run(
        [sys.executable, "-c", DEFAULTS, str(family(name))],
        capture_output=True,
        text=True,
        env=environment(VLLM_PLUGINS="eadaprune"),
        timeout=240,
    )
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("FOUND")]
    default = ["FOUND", str(target), "1.0"]
    assert lines == [[*default, "16"], [*default, "4"], ["FOUND", "None", "0.9", "16"]], found.stderr
    said = (found.stdout + found.stderr).count("energy is 1 by default for this model")
    assert said == (0 if target else 2)


def test_load_aware_thresholds_are_refused_where_they_cannot_work() -> None:
    def refusal(serving: bool = True, **flags: bool) -> str:
        args = argparse.Namespace(**({"disable_log_stats": False, "enable_elastic_ep": False} | flags))
        with pytest.raises(StartupError) as refused:
            configuration.check_load_aware(serving, args)
        return str(refused.value)

    assert "works in vllm serve only" in refusal(serving=False)
    assert "--disable-log-stats" in refusal(disable_log_stats=True)
    assert "--enable-elastic-ep" in refusal(enable_elastic_ep=True)


NAMESPACE = """
import argparse, sys
from vllm.engine.arg_utils import EngineArgs
for _ in range(2):
    args = argparse.Namespace(model=sys.argv[1])
    assert EngineArgs.from_cli_args(args).model == sys.argv[1]
print("fine")
"""


@pytest.mark.server
def test_installed_plugin_changes_nothing_for_other_callers_of_vllm(model: Path) -> None:
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


@pytest.mark.server
def test_the_data_parallel_supervisor_hands_plugin_and_options_to_its_children() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SUPERVISOR], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert "eadaprune,lora" in found.stdout, found.stderr[-2000:]
    assert "{'eadaprune': {'energy': 0.9}}" in found.stdout


@pytest.mark.parametrize("given", [0.5, [], "x"])
def test_server_options_must_be_an_object(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "eadaprune")
    args = argparse.Namespace(mm_processor_kwargs={"eadaprune": given}, eadaprune_energy=0.9)
    apply_flags(args)
    with pytest.raises(StartupError, match="is not an object"):
        configuration.operator_options(args.mm_processor_kwargs["eadaprune"])
