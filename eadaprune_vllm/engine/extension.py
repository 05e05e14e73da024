"""The worker extension together with one of the operator's: vLLM takes one class only."""

import functools
from typing import Any

OURS = "eadaprune_vllm.engine.worker.DecidingWorker"


def extended(theirs: str) -> str:
    """What ``worker_extension_cls`` becomes, once or again.

    Args:
        theirs: what it was, or nothing.
    """
    if theirs in ("", OURS) or theirs.startswith(f"{__name__}."):
        return theirs or OURS
    return f"{__name__}.{theirs.replace('.', ':')}"


@functools.cache
def __getattr__(name: str) -> Any:
    """Both, as the class of a name that ``extended`` makes."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if ":" not in name:
        raise AttributeError(name)
    ours, theirs = (resolve_obj_by_qualname(path) for path in (OURS, name.replace(":", ".")))
    return type(f"{ours.__name__}And{theirs.__name__}", (ours, theirs), {})
