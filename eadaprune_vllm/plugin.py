"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

Installed is not active: until the plugin is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, all it does is
to add its flags to vLLM's command line.
"""

import logging
import os
from importlib.metadata import entry_points

from eadaprune_vllm.errors import StartupError

NAME = "eadaprune"
logger = logging.getLogger("vllm." + __name__)
_ENDPOINTS = "vllm.endpoint_plugins"
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def register() -> None:
    """Add the flags; if the plugin is named, activate it as well."""
    from eadaprune_vllm import hooks

    if NAME in (named_plugins() or ()):
        activate()
    try:
        hooks.install_flags()
    except (ImportError, AttributeError):
        # A vLLM that we do not know must not suffer from a package that is merely installed.
        logger.warning("eadaprune: this version of vLLM is not supported; --plugin is not available")


def activate() -> None:
    """Put our models in the place of vLLM's and hook into configuration, requests and metrics.

    Raises:
        StartupError: if vLLM is not of a tested version.
    """
    from vllm import ModelRegistry

    from eadaprune_vllm import hooks
    from eadaprune_vllm.models import ARCHITECTURES

    hooks.check_version()
    # The tower runs on OpenMP threads before the engine process exists; a forked engine would hang in its own.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for architecture, model in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model)
    hooks.install()


def named_plugins() -> list[str] | None:
    """The names in ``VLLM_PLUGINS``, or None if it is unset and vLLM loads whatever is installed."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def name_plugins(names: list[str]) -> None:
    """Add ``names`` to the plugins of this process and its children, and load those that were not loaded yet.

    ``VLLM_PLUGINS`` is an allow-list: to an unset one the names vLLM would have loaded anyway are added first, or
    naming one plugin would switch the others off.

    Raises:
        StartupError: if a name is that of no installed plugin.
    """
    endpoints = {entry.name for entry in entry_points(group=_ENDPOINTS)}
    others = {entry.name for group in _GROUPS for entry in entry_points(group=group)}
    installed = endpoints | others
    for name in names:
        if name not in installed:
            raise StartupError(
                f"--plugin {name}: no such plugin is installed; installed are {', '.join(sorted(installed))}"
            )
    before = named_plugins()
    # Ours does nothing unless it is named, so it is not one of those that vLLM would have loaded anyway.
    loaded = others - {NAME} if before is None else {*before}
    if before is None and (mounted := loaded & endpoints - {*names}):
        logger.warning("--plugin also names these plugins, whose HTTP routes are served now: %s", sorted(mounted))
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(loaded | {*names}))
    for entry in entry_points(group=_GROUPS[0]):
        if entry.name == NAME and NAME in names:
            activate()
        elif entry.name in names and entry.name not in loaded:
            entry.load()()
