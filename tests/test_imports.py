"""Packages import from those below them only, and modules never in a circle; imports within functions count."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import eadaprune_vllm

ROOT = Path(eadaprune_vllm.__file__).parent.parent
# From below to above.
ORDER = [
    *("errors", "core", "reference", "compat", "patching", "messages", "overlap", "architectures"),
    *("engine", "frontend", "models", "startup", "http", "patches", "plugin", "tools", "demo", "cli", "__main__"),
]


def name_of(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(source): source for source in (ROOT / "eadaprune_vllm").rglob("*.py")}


def imports(module: str) -> Iterator[str]:
    """The modules of ours that a module imports."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in names)


def test_no_package_imports_from_one_above_it() -> None:
    def level(module: str) -> int:
        return ORDER.index(module.split(".")[1]) if "." in module else -1  # the package itself imports nothing

    upwards = [(module, other) for module in MODULES for other in imports(module) if level(other) > level(module)]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: {*imports(module)} - {module} for module in MODULES}).prepare()
