"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

Installed is not active: until the plugin is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, all it does is
to add its flags to vLLM's command line.
"""

import os
from importlib.metadata import entry_points

from eadaprune_vllm.errors import StartupError

NAME = "eadaprune"
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def register() -> None:
    """Add the flags; if the plugin is named, activate it as well."""
    from eadaprune_vllm import hooks

    hooks.install_flags()
    if NAME in (named_plugins() or ()):
        activate()


def activate() -> None:
    """Put our models in the place of vLLM's and hook into configuration, requests and metrics."""
    from vllm import ModelRegistry

    from eadaprune_vllm import hooks
    from eadaprune_vllm.models import ARCHITECTURES

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
    installed = {entry.name for group in (*_GROUPS, "vllm.endpoint_plugins") for entry in entry_points(group=group)}
    for name in names:
        if name not in installed:
            raise StartupError(
                f"--plugin {name}: no such plugin is installed; installed are {', '.join(sorted(installed))}"
            )
    before = named_plugins()
    loaded = {entry.name for group in _GROUPS for entry in entry_points(group=group)} if before is None else {*before}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(loaded | {*names}))
    for entry in entry_points(group=_GROUPS[0]):
        if entry.name == NAME and NAME in names:
            activate()
        elif entry.name in names and entry.name not in loaded:
            entry.load()()
