"""The releases of vLLM that are supported, and what differs between them.

CONTRIBUTING.md says how the window is moved.
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
        path: the newer one, ``module:name``.
        before: the older one.
        until: the first release that has the newer one. Once the window begins there, this entry goes.
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
    """Have the processor cache let go of what an engine misses, as releases from 0.33 do before they process."""
    if drain := getattr(renderer, "_drain_mm_cache_invalidations", None):
        drain()


def version() -> str:
    """The version of the vLLM in use."""
    import vllm

    return str(vllm.__version__)


def is_supported() -> bool:
    """Whether the vLLM in use is of a supported version."""
    return SUPPORTED.contains(version(), prereleases=True)


def check_version() -> None:
    """Raises:
    StartupError: if vLLM is of no supported version and the check was not switched off.
    """
    if not is_supported() and not os.environ.get(SKIP_VERSION_CHECK):
        raise StartupError(
            f"vLLM {version()} is not supported; supported is {SUPPORTED} "
            f"(set {SKIP_VERSION_CHECK}=1 to try it all the same)"
        )


def find(path: str) -> tuple[Any, str]:
    """Where something of vLLM is in the release in use.

    Args:
        path: ``module:name`` or ``module:Class.name``, as the newest release has it.

    Returns:
        The module or class that has it, and its name there.

    Raises:
        ImportError, AttributeError: if it is nowhere.
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
