"""Diagnoses an installation, a model and a server, in lines for a bug report.

It starts no engine and loads no weights. Imports are late, because an import error is a finding too.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Literal

from pydantic import ValidationError

from eadaprune_vllm import __version__, compat
from eadaprune_vllm.core.options import CHUNK, MODALITIES
from eadaprune_vllm.startup.naming import NAME, named_plugins

State = Literal["ok", "warning", "failed"]
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")  # where vLLM looks for this package
_SECONDS = 10  # a server's time to respond


@dataclass(frozen=True)
class Finding:
    """One line of the output.

    Attributes:
        about: what was checked.
        text: the result.
        state: of the check; None for plain information.
    """

    about: str
    text: str
    state: State | None = None

    def __str__(self) -> str:
        return f"{self.about:<14} " + ": ".join(filter(None, (self.state, self.text)))


def examine(
    model: str | None = None, dtype: str | None = None, revision: str | None = None, url: str | None = None
) -> Iterator[Finding]:
    """Run all checks, without raising. Activates the plugin in this process.

    Args:
        model: folder or hub id of a model to check.
        dtype: vLLM's dtype of the model.
        revision: of the model on the hub.
        url: of a running server to check.
    """
    yield Finding(NAME, __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    yield from _without_raising("vLLM", check_vllm())
    yield from _without_raising("torch", check_torch())
    yield from _without_raising("transformers", check_transformers())
    yield check_plugin()
    patches = [*_without_raising("patches", check_patches())]
    yield from patches
    if model is not None and any(each.state == "failed" for each in patches):
        yield Finding("model", "not checked, because the patches failed", "failed")
    elif model is not None:
        yield from _without_raising("model", check_model(model, dtype, revision))
    if url is not None:
        yield from _without_raising("server", check_server(url))


def _without_raising(about: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; an exception becomes the last one."""
    try:
        yield from findings
    except Exception as error:
        yield Finding(about, _sentence(error), "failed")


def _sentence(error: Exception) -> str:
    """The error's message in one line."""
    text = str(error).removeprefix(f"{NAME}: ")
    if isinstance(error, ValidationError):
        text = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
    elif not type(error).__module__.startswith("eadaprune_vllm."):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def check_vllm() -> Iterator[Finding]:
    """The version of vLLM, and its device. An unsupported version is a warning; the patches may fail with it."""
    from vllm.platforms import current_platform

    found, device = f"{compat.version()}, supported is {compat.SUPPORTED}", current_platform.device_type
    yield Finding("vLLM", found, "ok" if compat.is_supported() else "warning")
    # Without a device vLLM does not start.
    yield Finding("vLLM's device", device or "none found", "ok" if device else "failed")


def check_torch() -> Iterator[Finding]:
    """torch's version, and the GPUs that it finds."""
    import torch

    yield Finding("torch", torch.__version__)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("GPUs", ", ".join(gpus) or "none found by torch")


def check_transformers() -> Iterator[Finding]:
    """The version of transformers."""
    yield Finding("transformers", metadata.version("transformers"))


def check_plugin() -> Finding:
    """Whether vLLM finds the plugin, and loads it."""
    entries = [entry for group in GROUPS for entry in metadata.entry_points(group=group) if entry.name == NAME]
    missing = {*GROUPS} - {entry.group for entry in entries}
    names = named_plugins()
    if missing:
        groups = ", ".join(sorted(missing))
        return Finding("plugin", f"not installed: there is no entry point {NAME} in {groups}", "failed")
    if names is None:
        return Finding("plugin", f"installed; --plugin {NAME} activates it", "ok")
    if NAME not in names:
        return Finding("plugin", f"VLLM_PLUGINS does not list {NAME}, so vLLM does not load it", "failed")
    return Finding("plugin", "installed, and activated by VLLM_PLUGINS", "ok")


def check_patches() -> Iterator[Finding]:
    """Whether all patches fit this vLLM; activates the plugin.

    Raises:
        StartupError: if vLLM lacks what pruning depends on.
    """
    from eadaprune_vllm import plugin
    from eadaprune_vllm.patches import command_line

    with _warnings() as warnings:
        plugin.activate()
        command_line.install()
        import_module("eadaprune_vllm.http.plugin")
    yield from [Finding("patches", text, "warning") for text in warnings] or [Finding("patches", "all applied", "ok")]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Context manager that collects the warnings of this package, whatever vLLM's log level."""
    import_module("vllm.logger")  # on import it removes handlers
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().removeprefix(f"{NAME}: "))

    logger, handler = logging.getLogger("vllm.eadaprune_vllm"), Collector(logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def check_model(model: str, dtype: str | None = None, revision: str | None = None) -> Iterator[Finding]:
    """Whether a model can be served, and the tokens of its largest image. The plugin must be active.

    Raises:
        StartupError: if the model cannot be served with pruning.
        Exception: other errors of vLLM and transformers.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    from eadaprune_vllm.core.server_options import ServerOptions
    from eadaprune_vllm.startup.front_end import kv_bytes_per_token

    config = EngineArgs(model, dtype=dtype or "auto", revision=revision).create_engine_config()  # runs startup.checks
    served, per_token = config.model_config, kv_bytes_per_token(config)
    options = ServerOptions.of(served.multimodal_config)
    most = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False).mm_max_toks_per_item
    kind = f"{served.architecture} in {str(served.dtype).removeprefix('torch.')}"
    yield Finding("model", f"{kind}, prompts of up to {served.max_model_len} tokens", "ok")
    yield Finding("KV cache", f"{per_token} bytes per token")
    for modality in (*MODALITIES, CHUNK):
        if tokens := most.get(modality):
            floor, size = min(options.floor(tokens), tokens), tokens * per_token / 2**20
            text = f"{tokens} tokens, {size:.1f} MiB of KV cache; by default at least {floor} are kept"
            yield Finding(f"largest {modality}", text)
    if options.target is None:
        yield Finding("default", f"energy {options.energy:g}, which keeps every token")
    else:
        yield Finding("default", f"target {options.target:g}; the server computes its energy when it starts")


def check_server(url: str) -> Iterator[Finding]:
    """The configuration of a running server.

    Raises:
        ServerError: if it cannot be reached, denies access, or does not prune.
    """
    from eadaprune_vllm.tools.examiner import ServedModel

    with closing(ServedModel(url, _SECONDS)) as server:
        config = server.config
    effective = config.effective
    yield Finding("server", f"{NAME} {config.version} on vLLM {config.vllm_version}", "ok")
    yield Finding("serves", f"{', '.join(config.models)}: {config.architecture} in {config.dtype}")
    target = "" if effective.target is None else f"target {effective.target:g}: "
    yield Finding("effective", f"{target}energy {effective.threshold:g} keeps {config.reference}")
    yield Finding("endpoints", str(len(config.endpoints)))
