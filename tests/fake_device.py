"""A fake CUDA device: tensors that say they are on ``cuda:0``, and have their numbers on the CPU.

As on a real one, operations on tensors of two devices fail. What would make the host wait for the device is counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose result, or its size, the host needs.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten._linalg_eigh.default,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
waits: list[str] = []  # why the host waited, in order


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=CUDA,
        )
        made.numbers = numbers
        return made

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def _read(self) -> Any:
        waits.append("a number")
        return self.numbers.item()

    def tolist(self) -> Any:
        waits.append("numbers")
        return self.numbers.tolist()

    # These are C++ in torch, and would look for a real device.
    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
                waits.append("size of a mask")
            elif isinstance(part, torch.Tensor) and not isinstance(part, OnDevice):
                waits.append("copy of an index")
        return OnDevice(self.numbers[tuple(map(_plain, parts))])

    def __iter__(self) -> Any:
        return map(OnDevice, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __float__(self) -> float:
        return float(self._read())

    def __bool__(self) -> bool:
        return bool(self._read())

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _plain(value: Any) -> Any:
    return value.numbers if isinstance(value, OnDevice) else value


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    if function not in _WAITING | _INDEXING and torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    ):
        with _Dispatch():  # type: ignore[no-untyped-call]
            return function.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    of_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    on_device = target == "cuda" if target else bool(of_device)
    if of_device and function in (aten._to_copy.default, aten.copy_.default) and not kwargs.get("non_blocking"):
        if target == "cpu" or len(of_device) < len(tensors):
            waits.append("copy")
    elif of_device and len(of_device) < len(tensors):
        if function in _INDEXING:
            waits.append("copy of an index")
        elif any(tensor.ndim for tensor in tensors if not isinstance(tensor, OnDevice)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})")
    elif tensors and not of_device and on_device and not kwargs.get("non_blocking"):
        waits.append("copy")
    if of_device and function in _WAITING:
        waits.append(str(function))
    if (
        of_device
        and function in _INDEXING
        and any(index is not None and index.dtype == torch.bool for index in args[1])
    ):
        waits.append("size of a mask")
    kwargs = kwargs | ({"device": torch.device("cpu")} if target else {})
    found = function(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if not on_device:
        return found
    return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations without tensors of the device, too: copies to it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Event:
    """An event of a device that is always done."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        waits.append("event")

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While open, ``torch.cuda`` has the fake device."""
    torch._C._ensureCUDADeviceGuardSet()
    stream = SimpleNamespace(synchronize=lambda: waits.append("stream"))
    for name, own in (
        ("Event", _Event),
        ("Stream", lambda device: stream),
        ("current_stream", lambda device: stream),
        ("stream", lambda stream: nullcontext()),
        ("device", lambda device: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, own)
    waits.clear()
    with _Dispatch():  # type: ignore[no-untyped-call]
        yield


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device."""
    return OnDevice(tensor.clone())
