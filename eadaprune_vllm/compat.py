"""The releases of vLLM that are supported, and what differs between them.

CONTRIBUTING.md says how to support a new release, and how to drop an old one.
"""

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from packaging.specifiers import SpecifierSet

from eadaprune_vllm.errors import StartupError

RELEASES = ("0.32.0", "0.33.0")  # that the tests run on, oldest first
SUPPORTED = SpecifierSet(">=0.32.0,<0.34")
SKIP_VERSION_CHECK = "EADAPRUNE_SKIP_VERSION_CHECK"


@dataclass(frozen=True)
class RenamedSymbol:
    """A name of vLLM that older releases have elsewhere.

    Attributes:
        path: the new name, ``module:name``.
        before: the old name.
        until: the first release with the new name. Once it is the oldest supported one, this entry goes.
    """

    path: str
    before: str
    until: str


RENAMED = (
    RenamedSymbol(
        path="vllm.entrypoints.anthropic.serving:DisabledThinkingEffortResolver._render_probe_prompt",
        before="vllm.entrypoints.anthropic.serving:AnthropicServingMessages._render_probe_prompt",
        until="0.33.0",
    ),
)


def drain_invalidations(renderer: Any) -> None:
    """Drop from the processor cache what an engine reported as missing. vLLM does so before it processes, from 0.33."""
    if drain := getattr(renderer, "_drain_mm_cache_invalidations", None):
        drain()


def version() -> str:
    """The version of the vLLM in use."""
    import vllm

    return str(vllm.__version__)


def is_supported() -> bool:
    """Whether the vLLM in use is supported."""
    return SUPPORTED.contains(version(), prereleases=True)


def check_version() -> None:
    """Raises:
    StartupError: if this vLLM is not supported and the check is not switched off.
    """
    if not is_supported() and not os.environ.get(SKIP_VERSION_CHECK):
        raise StartupError(
            f"vLLM {version()} is not supported; supported is {SUPPORTED} (set {SKIP_VERSION_CHECK}=1 to try it anyway)"
        )


def find(path: str) -> tuple[Any, str]:
    """Find a function or class of vLLM in the release in use.

    Args:
        path: ``module:name`` or ``module:Class.name``, as in the newest release.

    Returns:
        The module or class that has it, and its name there.

    Raises:
        ImportError, AttributeError: if this release has no such name.
    """
    try:
        return _owner(path)
    except (ImportError, AttributeError):
        for moved in RENAMED:
            if moved.path == path:
                return _owner(moved.before)
        raise


def _owner(path: str) -> tuple[Any, str]:
    module, _, name = path.partition(":")
    owner, (*classes, last) = import_module(module), name.split(".")
    for step in classes:
        owner = getattr(owner, step)
    getattr(owner, last)
    return owner, last
