"""Whether this package works here, with a model and at a server, in lines for a bug report.

Starts no engine and loads no weights. What is looked at is imported late: that it cannot be is a finding too.
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
_SECONDS = 10  # that a server has for its answer


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        about: what was looked at.
        says: what there is to say of it.
        state: whether that is well; None for a mere fact.
    """

    about: str
    says: str
    state: State | None = None

    def __str__(self) -> str:
        return f"{self.about:<14} " + ": ".join(filter(None, (self.state, self.says)))


def examine(
    model: str | None = None, dtype: str | None = None, revision: str | None = None, url: str | None = None
) -> Iterator[Finding]:
    """Look at everything, one after the other; nothing is raised. Activates the plugin in this process.

    Args:
        model: folder or hub id of a model that might be served, if any.
        dtype: vLLM's, of that.
        revision: of the hub's model.
        url: of a running server, if there is one.
    """
    yield Finding(NAME, __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    yield from _tried("vLLM", release())
    yield from _tried("torch", torch_and_gpus())
    yield from _tried("transformers", transformers())
    yield named()
    found = [*_tried("patches", patches())]
    yield from found
    if model is not None and any(each.state == "failed" for each in found):
        yield Finding("model", "nothing can be said of it without the patches", "failed")
    elif model is not None:
        yield from _tried("model", of_model(model, dtype, revision))
    if url is not None:
        yield from _tried("server", of_server(url))


def _tried(about: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings, and what ends them before their time, whatever that is."""
    try:
        yield from findings
    except Exception as error:
        yield Finding(about, _sentence(error), "failed")


def _sentence(error: Exception) -> str:
    """What it says, in one line."""
    text = str(error).removeprefix(f"{NAME}: ")
    if isinstance(error, ValidationError):
        text = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
    elif not type(error).__module__.startswith("eadaprune_vllm."):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def release() -> Iterator[Finding]:
    """The vLLM in use, and the device it is for. Whether it may be of another version is for the patches to say."""
    from vllm.platforms import current_platform

    found, device = f"{compat.version()}, supported is {compat.SUPPORTED}", current_platform.device_type
    yield Finding("vLLM", found, "ok" if compat.is_supported() else "warning")
    # Without one vLLM starts nothing.
    yield Finding("vLLM's device", device or "it finds none", "ok" if device else "failed")


def torch_and_gpus() -> Iterator[Finding]:
    """torch's version, and the GPUs that it finds."""
    import torch

    yield Finding("torch", torch.__version__)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("GPUs", ", ".join(gpus) or "torch finds none")


def transformers() -> Iterator[Finding]:
    yield Finding("transformers", metadata.version("transformers"))


def named() -> Finding:
    """Whether vLLM finds the plugin, and may load it."""
    entries = [entry for group in GROUPS for entry in metadata.entry_points(group=group) if entry.name == NAME]
    missing = {*GROUPS} - {entry.group for entry in entries}
    names = named_plugins()
    if missing:
        return Finding("plugin", f"vLLM does not find {NAME} among {', '.join(sorted(missing))}: install it", "failed")
    if names is None:
        return Finding("plugin", f"installed; to be named by --plugin {NAME}", "ok")
    if NAME not in names:
        return Finding("plugin", f"VLLM_PLUGINS does not list {NAME}, so vLLM never asks it for its flags", "failed")
    return Finding("plugin", "installed, and named in VLLM_PLUGINS", "ok")


def patches() -> Iterator[Finding]:
    """Whether vLLM has all that the plugin takes hold of; activates it.

    Raises:
        StartupError: if it lacks what pruning depends on.
    """
    from eadaprune_vllm import plugin
    from eadaprune_vllm.patches import command_line

    with _warnings() as warned:
        plugin.activate()
        command_line.install()
        import_module("eadaprune_vllm.http.plugin")
    yield from [Finding("patches", text, "warning") for text in warned] or [Finding("patches", "all there", "ok")]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What this package warns of while it is open, however little vLLM may log."""
    import_module("vllm.logger")  # or else it would take the handler off again
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().removeprefix(f"{NAME}: "))

    logger, handler = logging.getLogger("vllm.eadaprune_vllm"), Collector(logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def of_model(model: str, dtype: str | None = None, revision: str | None = None) -> Iterator[Finding]:
    """Whether a model can be served, and what an image costs at most; needs the plugin to be active.

    Raises:
        StartupError: if it cannot.
        Exception: whatever vLLM and transformers raise of it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    from eadaprune_vllm.core.server_options import ServerOptions
    from eadaprune_vllm.startup.configuration import kv_bytes_per_token

    config = EngineArgs(model, dtype=dtype or "auto", revision=revision).create_engine_config()  # which checks it
    served, per_token = config.model_config, kv_bytes_per_token(config)
    options = ServerOptions.of(served.multimodal_config)
    most = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False).mm_max_toks_per_item
    kind = f"{served.architecture} in {str(served.dtype).removeprefix('torch.')}"
    yield Finding("model", f"{kind}, prompts of up to {served.max_model_len} tokens", "ok")
    yield Finding("KV cache", f"{per_token} bytes per token")
    for modality in (*MODALITIES, CHUNK):
        if tokens := most.get(modality):
            floor, size = min(options.floor(tokens), tokens), tokens * per_token / 2**20
            text = f"{tokens} tokens, {size:.1f} MiB of KV cache; never cut below {floor} by default"
            yield Finding(f"largest {modality}", text)
    if options.target is None:
        yield Finding("default", f"energy {options.energy:g}, which keeps every token")
    else:
        yield Finding("default", f"target {options.target:g}, whose energy a server finds when it starts")


def of_server(url: str) -> Iterator[Finding]:
    """What a server says of itself.

    Raises:
        ServerError: if it does not answer, does not let this client in, or does not prune.
    """
    from eadaprune_vllm.tools.examiner import ServedModel

    with closing(ServedModel(url, _SECONDS)) as server:
        config = server.config
    target = config.reference.options.target
    yield Finding("server", f"{NAME} {config.version} on vLLM {config.vllm_version}", "ok")
    yield Finding("serves", f"{', '.join(config.models)}: {config.architecture} in {config.dtype}")
    yield Finding("in force", ("" if target is None else f"target {target:g}: ") + str(config.reference))
    yield Finding("endpoints", str(len(config.endpoints)))
