"""Commands in the documents are ones that the programs take: their subcommands, targets, files and options exist."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from eadaprune_vllm.cli import app
from eadaprune_vllm.demo.server import VLLM

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "deploy", "docker", "docs", "eadaprune_vllm")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.md"))])
PROGRAM = re.compile(r"(eadaprune|vllm serve|make|python benchmarks/\S+\.py)( |$)")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each after where it stands, without comments."""
    for path in DOCUMENTS:
        text = path.read_text()
        blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        for line in filter(PROGRAM.match, [*lines, *spans]):
            yield f"{path.relative_to(ROOT)}: {line}", shlex.split(line, comments=True)


def options(words: list[str]) -> set[str]:
    """A word of several is what an option is given, such as flags for another program."""
    return {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2 and " " not in word}


COMMANDS = list(commands())


def typed(name: str) -> pytest.MarkDecorator:
    """A test gets the words of each command of that program."""
    found = [pytest.param(words, id=where) for where, words in COMMANDS if words[0] == name]
    assert len(found) > 5
    return pytest.mark.parametrize("words", found)


@pytest.fixture(scope="module")
def of_vllm_serve() -> set[str]:
    shown = subprocess.run([VLLM, "serve", "--help=all"], capture_output=True, text=True, check=True, timeout=300)
    return {*re.findall(r"--[\w-]+", shown.stdout)}


@typed("eadaprune")
def test_own_modules_import_in_order(words: list[str]) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if len(words) > 1:
        known = {flag for parameter in commands[words[1]].params for flag in parameter.opts + parameter.secondary_opts}
        assert options(words) <= known


@pytest.mark.server
@typed("vllm")
def test_vllm_serve(of_vllm_serve: set[str], words: list[str]) -> None:
    assert options(words) <= of_vllm_serve


@typed("make")
def test_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= {*targets}


@typed("python")
def test_benchmarks(words: list[str]) -> None:
    script = (ROOT / words[1]).read_text()
    for option in options(words):
        assert option in script or option.removeprefix("--").replace("-", "_") in script
