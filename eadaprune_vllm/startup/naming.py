"""The plugins that vLLM loads: those named by ``--plugin`` or in ``VLLM_PLUGINS``."""

import logging
import os
from importlib.metadata import entry_points

from eadaprune_vllm.errors import StartupError

NAME = "eadaprune"
logger = logging.getLogger("vllm." + __name__)
_ENDPOINTS = "vllm.endpoint_plugins"
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def named_plugins() -> list[str] | None:
    """The names in ``VLLM_PLUGINS``; None if it is unset, and vLLM loads all installed plugins."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def name_plugins(names: list[str]) -> None:
    """Add ``names`` to the plugins of this process and its children, and load those that are not loaded yet.

    ``VLLM_PLUGINS`` is an allow-list. If it is unset, the names of all plugins that vLLM loads anyway are added too, as
    naming one plugin would switch the others off.

    Raises:
        StartupError: if no plugin of a name is installed.
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
    # Ours does nothing unless it is named, so it is not among the plugins that vLLM loads anyway.
    loaded = others - {NAME} if before is None else {*before}
    if before is None and (mounted := loaded & endpoints - {*names}):
        logger.warning("--plugin also activates the HTTP routes of these plugins: %s", sorted(mounted))
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(loaded | {*names}))
    for entry in entry_points(group=_GROUPS[0]):
        if entry.name in names and entry.name not in loaded:
            entry.load()()
