"""Combines our worker extension with the operator's: vLLM takes one class only."""

import functools
from typing import Any

OURS = "eadaprune_vllm.engine.worker.DecidingWorker"


def extended(theirs: str) -> str:
    """The new value of ``worker_extension_cls``; calling this twice changes nothing.

    Args:
        theirs: the old value; may be empty.
    """
    if theirs in ("", OURS) or theirs.startswith(f"{__name__}."):
        return theirs or OURS
    return f"{__name__}.{theirs.replace('.', ':')}"


@functools.cache
def __getattr__(name: str) -> Any:
    """The class that combines both extensions, by a name that ``extended`` returned."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if ":" not in name:
        raise AttributeError(name)
    ours, theirs = (resolve_obj_by_qualname(path) for path in (OURS, name.replace(":", ".")))
    return type(f"{ours.__name__}And{theirs.__name__}", (ours, theirs), {})
