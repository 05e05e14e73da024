"""vLLM as a library, where something changes or fails in the middle: new weights, an engine that dies, ``AsyncLLM``."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from library import FACTOR, is_scaled
from safetensors.torch import load_file, save_file
from shared import Reference, photo
from test_offline import run

SCRIPT = Path(__file__).with_name("library.py")
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with another tower."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if is_scaled(name):
            weight *= FACTOR
    save_file(weights, folder / "model.safetensors")
    return folder


def test_old_weights_are_never_served(model: Path, other_model: Path) -> None:
    """However they change, though nobody empties a cache: what is answered is what a new engine answers, and what is
    asked again comes out of its caches."""
    with ThreadPoolExecutor() as pool:
        changed = pool.submit(run, "weights", model, other_model, script=SCRIPT, **ONE_PROCESS)
        fresh = pool.submit(run, "fresh", other_model, script=SCRIPT, **ONE_PROCESS).result()["fresh"]
    found = changed.result()

    def differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return bool(one["tokens"] != other["tokens"] or one["first"] != pytest.approx(other["first"], abs=1e-4))

    before, again = found["before"]
    assert not differs(before, again)
    assert again["cached"] > 0
    assert differs(before, fresh)
    for way in ("reloaded", "function", "extension"):
        first, second = found[way]
        assert not differs(first, fresh)
        assert not differs(second, fresh)
        assert first["cached"] == 0 < second["cached"]
        assert not differs(found[f"before {way}"][0], before)
    assert found["kept"][0]["cached"] > 0  # a call that leaves weights alone costs nothing


def test_engine_death_during_a_decision_is_an_error(model: Path) -> None:
    """As on stock vLLM, not a program that waits for ever."""
    assert run("killed", model, script=SCRIPT) == {"error": "EngineDeadError"}


def test_asyncllm_takes_prompts_raw_and_rendered(model: Path, reference: Reference) -> None:
    found = run("asynchronous", model, script=SCRIPT)
    tokens = found["rendered"]
    assert found["raw"] == [tokens] * 3
    assert found["after"] == found["stream"] == tokens
    assert 0 < tokens - len(reference.kept(photo("astronaut"), energy=0.9, min_tokens=16)) < 40
    assert "render_cmpl_async" in found["error"]  # the loop would wait for itself
