"""``--plugin`` and ``--eadaprune-*`` on whatever command line vLLM builds from its engine arguments."""

import sys
from typing import Any

from eadaprune_vllm.patching import wrap
from eadaprune_vllm.startup.flags import add_flags, apply_flags

_LOST = "--plugin and --eadaprune-* are not available"


def install() -> None:
    """Warns where others fail: a vLLM that we do not know must not suffer from a package that is merely installed."""

    @wrap("vllm.engine.arg_utils:EngineArgs.add_cli_args", optional=_LOST)
    def add_cli_args(original: Any, parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        # `vllm serve` has imported it by now; elsewhere it is not used, and too slow to import.
        if "vllm.entrypoints.launchers.dp_supervisor" in sys.modules:
            _install_supervisor()
        return parser

    @wrap("vllm.engine.arg_utils:EngineArgs.from_cli_args", optional=_LOST)
    def from_cli_args(original: Any, cls: Any, args: Any) -> Any:
        apply_flags(args)
        return original(cls, args)


def _install_supervisor() -> None:
    """The data-parallel supervisor passes the command line on to its children without turning it into engine
    arguments, and the children load no plugin before they do that."""

    @wrap(
        "vllm.entrypoints.launchers.dp_supervisor:DPSupervisor.__init__",
        optional=f"with a data-parallel supervisor {_LOST}",
    )
    def init(original: Any, supervisor: Any, args: Any) -> None:
        apply_flags(args)
        original(supervisor, args)
