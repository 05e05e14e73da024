"""vLLM's offline ``LLM`` class under ``VLLM_PLUGINS=eadaprune``."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import environment
from shared import Reference, noise, photo

Found = tuple[dict[str, Any], dict[str, Any]]
SCRIPT = Path(__file__).with_name("offline.py")


def run(what: str, *paths: Path, script: Path = SCRIPT, **env: str) -> Any:
    own = (str(folder) for folder in (SCRIPT.parent, SCRIPT.parent.parent))
    path = os.pathsep.join([*filter(None, [env.pop("PYTHONPATH", os.environ.get("PYTHONPATH"))]), *own])
    output = subprocess.run(
        [sys.executable, str(script), what, *map(str, paths)],
        env=environment(VLLM_PLUGINS="eadaprune", PYTHONPATH=path, VLLM_ALLOW_INSECURE_SERIALIZATION="1", **env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    results = [line.removeprefix("RESULT ") for line in output.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, output.stdout[-3000:] + output.stderr[-3000:]
    return json.loads(results[0])


@pytest.fixture(scope="module")
def found(model: Path) -> Found:
    """Of an engine with processes of its own, with budgets by span, and of one in the process of the program."""
    with ThreadPoolExecutor() as pool:
        apart = pool.submit(run, "by span", model)
        inside = pool.submit(run, "blocks", model, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return apart.result(), inside.result()


def check_counts(found: dict[str, Any], reference: Reference, budget: str) -> None:
    default, dense, full = found["tokens"]
    assert full - 576 == default - len(reference.kept(photo("astronaut"), budget=budget, energy=0.9))
    assert full - 576 == dense - len(reference.kept(photo("astronaut"), budget=budget, energy=0.99))
    assert found["whole"] == dense
    assert found["chat"][1] - found["chat"][0] == dense - default > 0
    assert "mm_processor_kwargs.eadaprune.energy=2 is not allowed" in found["error"]


def test_counts(found: Found, reference: Reference) -> None:
    apart, inside = found
    check_counts(apart, reference, "span")
    assert apart["tokens"] > inside["tokens"]


def test_kv_blocks_step_by_step(found: Found, reference: Reference) -> None:
    """With the engine in this process, its blocks in use are exactly those of the tokens it computed."""
    _, inside = found
    check_counts(inside, reference, "spectrum")
    assert len(inside["differences"]) > 100
    assert set(inside["differences"]) == {0}
    assert inside["free"] == 0


def test_decisions_about_one_image_have_separate_cache_entries(found: Found) -> None:
    """Whatever makes an engine decide otherwise the next time, rows and placeholders are of one decision, and no cache
    takes one for the other."""
    _, inside = found
    fixed = dict(inside["fixed"])
    assert len(fixed) == 3
    assert {tokens for tokens, _ in inside["whims"]} == fixed.keys()
    assert len(inside["whims"]) == 120
    assert all(answer == fixed[tokens] for tokens, answer in inside["whims"])


def test_beam_search(found: Found, reference: Reference) -> None:
    _, inside = found
    (one,), several = inside["beams"]
    assert one == inside["greedy"]
    assert len(several) == len({*map(tuple, several)}) == 3
    kept = len(reference.kept(photo("coffee"), energy=0.9))
    assert {len(beam) for beam in several} == {inside["tokens"][2] - 576 + kept + 6}


@pytest.mark.slow
@pytest.mark.parametrize("own_process", ["1", "0"])
def test_embeddings_of_many_images(model: Path, reference: Reference, own_process: str) -> None:
    results = run("embed", model, VLLM_ENABLE_V1_MULTIPROCESSING=own_process)
    found = results["embeddings"]
    assert found[:20] == found[20:]
    kept = [len(reference.kept(noise(number), energy=0.9, min_tokens=16)) for number in range(20)]
    assert len({tokens - own for (tokens, _), own in zip(found, kept, strict=False)}) == 1
    check_scored(results, reference)


@pytest.mark.slow
def test_pairs_of_a_cross_encoder(scorer: Path, reference: Reference) -> None:
    check_scored(run("classify", scorer), reference)


def check_scored(found: dict[str, Any], reference: Reference) -> None:
    """Options in a document count."""
    default, dense = (len(reference.kept(photo("astronaut"), energy=energy)) for energy in (0.9, 0.99))
    assert found["scored"][1] - found["scored"][0] == dense - default > 0
