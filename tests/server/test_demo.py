"""The embedded model sees, and the demonstration shows what pruning does to it."""

import asyncio
from pathlib import Path

import pytest
from harness import Server
from rich.console import Console

from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.questions import CATEGORIES, write_questions
from eadaprune_vllm.demo.run import PHASES, SCENES, SETTINGS, demo_pictures, run_demo
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import DTYPE
from eadaprune_vllm.tools.evaluate import UNPRUNED, Results, run
from eadaprune_vllm.tools.questions import read_questions


def test_the_model_answers_better_than_chance_in_every_category(tmp_path: Path, logs: Path) -> None:
    results = Results(read_questions(write_questions(tmp_path, 50)))
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--max-model-len", "2048", "--dtype", DTYPE]
    with Server(logs / "trained.log", MODEL, *flags) as server:
        asyncio.run(run(results, server.url, [UNPRUNED]))
    (row,), chance = results.summary(), results.chance()
    for category in CATEGORIES:
        assert row["category"][category]["interval"][0] > chance[category]


def test_demo_prints_and_draws_everything(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    run_demo(MODEL, tmp_path, console)
    text = console.export_text()
    said = [text.index(phase) for phase in PHASES.values()]
    assert said == sorted(said)
    assert text.rstrip().endswith("says before whether it can be served")
    assert "serves this model; drop pictures into the page at http://localhost:8000/eadaprune\n" in text
    for name, picture in demo_pictures().items():
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert text.count(f"{name} ") >= 1
        assert text.count(f"/{len(picture.questions)} ") >= len(SETTINGS) * bool(picture.questions)


@pytest.mark.parametrize("density", SCENES)
def test_demo_scenes_have_the_named_density(density: str) -> None:
    assert make_scene(SCENES[density], held_out=True).density == density
