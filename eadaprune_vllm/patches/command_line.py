"""``--plugin`` and ``--eadaprune-*`` on every command line that has vLLM's engine arguments."""

import sys
from typing import Any

from eadaprune_vllm.patching import wrap
from eadaprune_vllm.startup.flags import add_flags, apply_flags

_LOST = "--plugin and --eadaprune-* are not available"


def install() -> None:
    """All of it is optional: a package that is merely installed must not stop an unsupported vLLM."""

    @wrap("vllm.engine.arg_utils:EngineArgs.add_cli_args", optional=_LOST)
    def add_cli_args(original: Any, parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        # Only `vllm serve` uses the supervisor, and has imported it by now; importing it here would be slow.
        if "vllm.entrypoints.launchers.dp_supervisor" in sys.modules:
            _install_supervisor()
        return parser

    @wrap("vllm.engine.arg_utils:EngineArgs.from_cli_args", optional=_LOST)
    def from_cli_args(original: Any, cls: Any, args: Any) -> Any:
        apply_flags(args)
        return original(cls, args)


def _install_supervisor() -> None:
    """The data-parallel supervisor passes the command line to its children without making engine arguments of it, and
    the children load plugins only after they have made theirs."""

    @wrap(
        "vllm.entrypoints.launchers.dp_supervisor:DPSupervisor.__init__",
        optional=f"with a data-parallel supervisor {_LOST}",
    )
    def init(original: Any, supervisor: Any, args: Any) -> None:
        apply_flags(args)
        original(supervisor, args)
