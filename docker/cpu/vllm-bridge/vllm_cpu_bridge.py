"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Such a torchvision cannot load its compiled operators, and its import then fails on two missing operator
schemas. vLLM needs only its pure-torch transforms, so declaring the schemas is enough. Where the operators
do load (a CPU build of torchvision), nothing is declared.

Runs at interpreter start-up through ``vllm_cpu_bridge.pth``, so it imports nothing heavy: a finder waits for
``torchvision.extension``, the module that loads the operators, and acts right after it.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # keeps the declarations alive


class _DeclareMissingSchemas(Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        global _library
        self._loader.exec_module(module)
        if not module._has_ops():
            import torch

            _library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _library.define(operator + _SCHEMA)


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision.extension":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclareMissingSchemas(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
