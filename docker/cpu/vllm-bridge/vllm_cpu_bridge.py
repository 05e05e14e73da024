"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Such a torchvision cannot load its compiled operators, and its import then fails on two missing operator
schemas. vLLM needs only its pure-torch transforms, so declaring the schemas is enough. Where the operators
do load (a CPU build of torchvision), nothing is declared.

Runs at interpreter start-up through ``vllm_cpu_bridge.pth``, so it imports nothing heavy: a finder waits for
``torchvision.extension``, the module that loads the operators, and acts right after it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: Any = None  # keeps the declarations alive


class _DeclareMissingSchemas(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        global _library
        self._loader.exec_module(module)
        if not module._has_ops():
            import torch

            library: Any = torch.library.Library
            _library = library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _library.define(operator + _SCHEMA)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision.extension":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclareMissingSchemas(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
