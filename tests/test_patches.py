"""Everything of vLLM's that is patched or read, against whatever vLLM is installed. No server."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version
from typing_extensions import override

import eadaprune_vllm
from eadaprune_vllm import compat
from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.patching import check_overrides, fits, wrap

ROOT = Path(__file__).parent.parent
SOURCES = sorted(Path(eadaprune_vllm.__file__).parent.rglob("*.py"))
# What is read of vLLM's objects where only a server would miss it: of what, which attributes.
READ = {
    "vllm.renderers.base:BaseRenderer": [
        "mm_processor",
        "model_config",
        "_mm_executor",
        "_process_multimodal",
        "_process_multimodal_async",
        "update_mm_cache_stats",
    ],
    "vllm.multimodal.processing:BaseMultiModalProcessor": [
        "_apply_hf_processor_main",
        "_get_cache_missing_processor_kwargs",
        "_get_mm_fields_config",
        "_get_mm_hashes",
        "_get_mm_prompt_updates",
        "_merge_mm_kwargs",
        "_postprocess_prompt",
    ],
    "vllm.config.parallel:ParallelConfig": [
        "_api_process_count",
        "_api_process_rank",
        "data_parallel_size",
        "data_parallel_size_local",
        "distributed_executor_backend",
        "local_engines_only",
        "worker_extension_cls",
    ],
    "vllm.config.model:ModelConfig": ["served_model_name", "get_total_num_kv_heads", "get_total_num_hidden_layers"],
    "vllm.config.multimodal:MultiModalConfig": [
        "enable_mm_embeds",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_hasher_algorithm",
        "video_pruning_rate",
    ],
    "vllm.config.observability:ObservabilityConfig": ["otlp_traces_endpoint"],
    "vllm.config.scheduler:SchedulerConfig": ["max_num_encoder_input_tokens"],
    "vllm.v1.engine.input_processor:InputProcessor": ["renderer", "vllm_config"],
    "vllm.v1.engine:EngineCoreRequest": ["trace_headers"],
    "vllm.v1.engine.async_llm:AsyncLLM": ["renderer", "engine_core", "logger_manager"],
    "vllm.v1.engine.llm_engine:LLMEngine": ["renderer", "engine_core"],
    "vllm.v1.engine.core:EngineCore": ["model_executor", "is_scheduler_paused"],
    "vllm.v1.engine.core_client:AsyncMPClient": [
        "_call_utility_async",
        "core_engines",
        "engine_ranks_managed",
        "resources",
    ],
    "vllm.v1.engine.core_client:BackgroundResources": ["engine_dead"],
    "vllm.v1.engine.core_client:InprocClient": ["engine_core"],
    "vllm.v1.engine.core_client:SyncMPClient": ["call_utility"],
    "vllm.v1.executor.abstract:Executor": ["collective_rpc", "is_sleeping"],
    "vllm.v1.worker.gpu_worker:Worker": ["model_runner", "_weight_update_active"],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ["device", "get_model", "vllm_config"],
    "vllm.v1.metrics.loggers:StatLoggerManager": ["stat_loggers"],
    "vllm.sampling_params:SamplingParams": ["extra_args"],
    "vllm.v1.request:Request": ["sampling_params"],
    "vllm.v1.metrics.stats:SchedulerStats": ["kv_cache_usage", "num_waiting_reqs"],
    "vllm.renderers.chat_utils:AsyncMultiModalItemTracker": ["create_parser", "resolve_items"],
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": [
        "base_model_paths",
        "is_base_model",
        "lora_requests",
    ],
    "vllm.multimodal.inputs:MultiModalFeatureSpec": ["data", "modality", "mm_position"],
    "vllm.model_executor.layers.attention:MMEncoderAttention": ["head_size", "scale"],
    "vllm.model_executor.models.llava:LlavaForConditionalGeneration": [
        "_parse_and_validate_image_input",
        "_process_image_pixels",
        "multi_modal_projector",
    ],
    "vllm.model_executor.models.llava_next:LlavaNextForConditionalGeneration": [
        "_image_pixels_to_features",
        "_merge_image_patch_embeddings",
        "multi_modal_projector",
        "vision_tower",
    ],
    "vllm.model_executor.models.llava_onevision:LlavaOnevisionForConditionalGeneration": [
        "_merge_image_patch_embeddings",
        "apply_pooling",
    ],
    "vllm.model_executor.models.minicpmv4_7:MiniCPMV4_7ForConditionalGeneration": [
        "_canvas_special_ids",
        "_uses_canvas_mrope",
    ],
}


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of vLLM's modules are not ours
        found = importlib.import_module(module)
        for step in filter(None, name.split(".")):
            if not hasattr(found, step):
                importlib.import_module(f"{module}.{step}")
            found = getattr(found, step)
    return found


def test_every_import_from_vllm_resolves() -> None:
    """Also those within functions."""
    missing = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for name in node.names:
                    try:
                        imported(f"{node.module}:{name.name}")
                    except ImportError:
                        missing.append(f"{source.name}: {node.module}.{name.name}")
    assert not missing


@pytest.mark.server
def test_every_wrapper_finds_what_it_wraps() -> None:
    """In a process of its own, which then is an active server's."""
    program = """
import vllm.entrypoints.launchers.dp_supervisor
from argparse import ArgumentParser
from eadaprune_vllm import plugin
from vllm.engine.arg_utils import EngineArgs

plugin.register()
EngineArgs.add_cli_args(ArgumentParser())  # which finds the supervisor
from eadaprune_vllm.patching import wrapped_paths
print(*sorted(wrapped_paths))
"""
    environment = os.environ | {"VLLM_PLUGINS": "eadaprune", "EADAPRUNE_SKIP_VERSION_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    # The documents list them all.
    listed = re.findall(r"^- `(vllm\.[\w.]+:[\w.]+)`$", (ROOT / "docs" / "features.md").read_text(), re.MULTILINE)
    assert done.stdout.splitlines()[-1].split() == listed
    assert "eadaprune: " not in done.stdout + done.stderr  # what was left out, with a warning


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_override_has_something_to_override(architecture: str) -> None:
    module = sys.modules[adapter(architecture).__module__]
    check_overrides(module)
    marked = {
        name
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for base in cls.__mro__
        for name, method in vars(base).items()
        if base.__module__.startswith("eadaprune_vllm.") and getattr(method, "__override__", False)
    }
    assert marked >= {"_cached_apply_hf_processor", "_get_prompt_updates", "embed_multimodal"}


@pytest.mark.parametrize("name", ["gone", "changed"])
def test_an_override_of_nothing_stops_the_start(name: str) -> None:
    class Theirs:
        def changed(self, other: int) -> None: ...

    def method(self: Any, value: int) -> None: ...

    Theirs.__module__ = "vllm.somewhere"
    cls = type("Ours", (Theirs,), {name: override(method)})
    module = ModuleType("of_ours")
    cls.__module__ = module.__name__
    vars(module).update(Ours=cls)
    with pytest.raises(StartupError, match=f"has no vllm.somewhere:Theirs.{name} with the signature it has in"):
        check_overrides(module)


@pytest.mark.parametrize("path", READ)
def test_every_attribute_that_is_read_exists(path: str) -> None:
    owner = imported(path)
    own = [base for base in owner.__mro__ if base.__module__.startswith("vllm.")]
    declared = {name for base in own for name in getattr(base, "__annotations__", ())}
    source = "" if is_dataclass(owner) else "".join(map(inspect.getsource, own))
    assigned = {*re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source)}
    assert [name for name in READ[path] if not (hasattr(owner, name) or name in declared | assigned)] == []


@pytest.mark.parametrize("module", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_every_name_replaced_while_a_model_is_built_exists(module: str) -> None:
    assert callable(imported(f"vllm.model_executor.models.{module}:mrope_positions_factor"))


@pytest.mark.parametrize("moved", compat.RENAMED, ids=[moved.path for moved in compat.RENAMED])
def test_renamed_symbols_exist_in_this_release(moved: compat.RenamedSymbol) -> None:
    here = moved.path if Version(compat.version()) >= Version(moved.until) else moved.before
    owner, name = compat.find(moved.path)
    assert (owner, name) == (imported(here.rpartition(".")[0]), here.rpartition(".")[2])


@pytest.mark.parametrize("moved", compat.RENAMED, ids=[moved.path for moved in compat.RENAMED])
def test_renamed_symbols_are_needed_by_the_oldest_release(moved: compat.RenamedSymbol) -> None:
    oldest = compat.RELEASES[0]
    assert Version(oldest) < Version(moved.until), f"vLLM {oldest} has {moved.path}: remove this entry"


def test_one_range_everywhere() -> None:
    assert [release for release in compat.RELEASES if not compat.SUPPORTED.contains(release)] == []
    bounds = {spec.operator: spec.version for spec in compat.SUPPORTED}
    newest = Version(compat.RELEASES[-1])
    assert bounds == {">=": compat.RELEASES[0], "<": f"{newest.major}.{newest.minor + 1}"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = (line for line in project["dependencies"] if re.match(r"vllm\b", line))
    assert required == f"vllm>={bounds['>=']},<{bounds['<']}"
    short = [release.removesuffix(".0") for release in compat.RELEASES]
    for document in ("README.md", "docs/serve.md", "docs/limits.md", "deploy/README.md"):
        text = (ROOT / document).read_text()
        assert f"vLLM {' or '.join(short)}" in text, document
        assert {*re.findall(r"vLLM (\d+\.\d+)", text)} <= {*short}, document
    assert f"ARG VLLM_IMAGE=vllm/vllm-openai:v{newest}\n" in (ROOT / "docker/cuda/Dockerfile").read_text()


Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("function", "original", "fit"),
    [
        (lambda a, b: 0, lambda a, b: 0, True),
        (lambda thing, b: 0, lambda self, b: 0, True),
        (lambda thing, b: 0, lambda first, b: 0, False),
        (lambda a, *more, **named: 0, lambda a, b, *, c=0: 0, True),
        (lambda a: 0, lambda a, b=0: 0, False),
        (lambda a, b: 0, lambda a: 0, False),
        (lambda a, b: 0, lambda b, a: 0, False),
        (lambda a, *more, c=0: 0, lambda a, *, c=0: 0, True),
        (lambda a, *more, c=0: 0, lambda a, c=0: 0, False),
        (lambda a: 0, lambda a, *, c: 0, False),
    ],
)
def test_fits(function: Call, original: Call, fit: bool) -> None:
    assert fits(function, original) is fit


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("patched_module")

    class Owner:
        def method(self, value: int) -> int:
            return value

        @staticmethod
        def static(value: int) -> int:
            return value

        @classmethod
        def of_class(cls, value: int) -> int:
            return value

    vars(module).update(Owner=Owner, function=lambda value: value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_wrapping_twice_wraps_once(host: ModuleType) -> None:
    for _ in range(2):

        @wrap("patched_module:function")
        def function(original: Call, value: int) -> Any:
            return original(value) + 1

        @wrap("patched_module:Owner.method")
        def method(original: Call, owner: Any, value: int) -> Any:
            return original(owner, value) + 1

        @wrap("patched_module:Owner.static")
        def static(original: Call, value: int) -> Any:
            return original(value) + 1

        @wrap("patched_module:Owner.of_class")
        def of_class(original: Call, cls: type, value: int) -> Any:
            return original(cls, value) + 1

    assert host.function(1) == 2
    assert [host.Owner().method(1), host.Owner.static(1), host.Owner.of_class(1), host.Owner().of_class(1)] == [2] * 4


@pytest.mark.parametrize(
    "path", ["patched_module:gone", "patched_module:Owner.gone", "no_such_host:f", "patched_module:function"]
)
def test_missing_functions_stop_the_start_or_are_left_out_with_a_warning(
    host: ModuleType, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapper(original: Call, other: int) -> Any: ...

    with pytest.raises(StartupError, match=f"has no {path} with the signature it has in .*, and pruning depends on it"):
        wrap(path)(wrapper)
    warned: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *args: warned.append(text % args))
    monkeypatch.setattr("eadaprune_vllm.patching.logger", logger)
    wrap(path, optional="colours are lost")(wrapper)
    assert warned[0].endswith("; colours are lost")
    assert host.function(1) == 1


def test_renamed_symbols_are_found_under_their_old_names(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = compat.RenamedSymbol("patched_module:Newer.method", before="patched_module:Owner.method", until="9")
    monkeypatch.setattr(compat, "RENAMED", (moved,))
    assert compat.find(moved.path) == (host.Owner, "method")
    with pytest.raises(AttributeError):
        compat.find("patched_module:Newer.other")
