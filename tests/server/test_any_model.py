"""``--eadaprune-any-model``: an architecture that is not in our table, on real vLLM, with random weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import environment

SCRIPT = Path(__file__).with_name("any_model.py")


@pytest.fixture(scope="module")
def run(family: Callable[[str], Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = family("idefics3")

    def run(what: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(folder) for folder in (SCRIPT.parent, SCRIPT.parent.parent))
        env = {} if what == "stock" else {"VLLM_PLUGINS": "eadaprune"}
        return subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), what],
            env=environment(PYTHONPATH=path, VLLM_ENABLE_V1_MULTIPROCESSING="0", **env),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def answers(done: subprocess.CompletedProcess[str]) -> list[list[dict[str, Any]]]:
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[list[dict[str, Any]]] = json.loads(results[0])
    return found


def test_a_model_that_fits_is_pruned_and_at_energy_one_its_answers_are_stocks(run: Callable[..., Any]) -> None:
    (stock,), (full, pruned) = answers(run("stock")), answers(run("pruning"))
    for ours, theirs in zip(full, stock, strict=True):
        assert ours["prompt"] == theirs["prompt"]
        assert ours["tokens"] == theirs["tokens"]
        shared = ours["first"].keys() & theirs["first"].keys()
        assert max(abs(ours["first"][token] - theirs["first"][token]) for token in shared) < 1e-5
    assert all(some["prompt"] < each["prompt"] for some, each in zip(pruned, full, strict=True))
    assert sum(some["tokens"] != each["tokens"] for some, each in zip(pruned, full, strict=True)) > 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "broken",
            "Idefics3ForConditionalGeneration cannot be pruned: this image could not be pruned: the model made 79 emb",
        ),
        ("unnamed", "Idefics3ForConditionalGeneration is not supported: --eadaprune-any-model tries it"),
    ],
)
def test_model_that_does_not_fit_is_refused_in_one_sentence(run: Callable[..., Any], what: str, words: str) -> None:
    done = run(what)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("eadaprune: ")]
    assert words in line
    assert "RESULT" not in done.stdout
