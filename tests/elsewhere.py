"""A device that is not the CPU, on machines that have no other: its tensors are computed on the CPU, but mixed with the
CPU's they fail as those of a GPU do, and whatever would wait for a GPU is counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla:0")  # torch knows it, and does not try to start it
_ATEN = torch.ops.aten
# What a GPU takes from the CPU beside its own tensors: indices, and the source of a copy.
_MIXED = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.copy_.default}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_WAITS = {_ATEN.nonzero.default, _ATEN._local_scalar_dense.default}


class There(torch.Tensor):
    """A tensor of that device; ``here`` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} while the device is away")


class _Calls(TorchFunctionMode):
    """What torch does not bring as far as ``_Operations``."""

    def __init__(self, operations: "_Operations") -> None:
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device", "cpu")) == DEVICE:
            return There(func(*args, **kwargs | {"device": "cpu"}))
        if func is torch.Tensor.tolist and isinstance(args[0], There):
            self.operations.waits["tolist"] += 1
            return args[0].here.tolist()
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # it looked for the device itself
            if "not linked with support" not in str(error):
                raise
        return self.operations.run(func, args, kwargs, indexing=func in _INDEXING)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {}, indexing=func in _MIXED)

    def run(self, func: Any, args: Any, kwargs: Any, indexing: bool) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
        if there and here and (not indexing or not isinstance(tensors[0], There)):
            raise RuntimeError(f"{func} of tensors on two devices")
        stays = bool(there)
        if kwargs.get("device") is not None:
            stays = torch.device(kwargs["device"]) == DEVICE
            kwargs = kwargs | {"device": torch.device("cpu")}
        masked = indexing and any(tensor.dtype == torch.bool for tensor in there[1:])
        if there and (func in _WAITS or masked or not stays):
            self.waits[getattr(func, "__name__", str(func))] += 1
        args, kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
        made = func(*args, **kwargs)
        if not stays:
            return made
        if getattr(func, "_schema", None) and func._schema.is_mutable:
            return there[0]
        return tree_map(lambda leaf: There(leaf) if isinstance(leaf, torch.Tensor) else leaf, made)


@contextmanager
def elsewhere(module: torch.nn.Module) -> Iterator[Counter[str]]:
    """While open, the module is on that device. Yields what was waited for."""
    operations = _Operations()
    with torch.inference_mode(), _Calls(operations), operations:
        for part in module.modules():
            held: list[dict[str, Any]] = [part._parameters, part._buffers]
            for tensors in held:
                tensors |= {name: There(tensor.detach()) for name, tensor in tensors.items() if tensor is not None}
        yield operations.waits
