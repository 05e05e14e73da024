"""The commands as a user runs them; what they say must be what a server does."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import DTYPE, Server, content, environment
from PIL import Image
from typer.testing import CliRunner, Result

from eadaprune_vllm.cli import app
from eadaprune_vllm.core.budget import TIE_TOLERANCE
from eadaprune_vllm.startup.naming import named_plugins

Images = dict[str, Image.Image]
EADAPRUNE = str(Path(sys.executable).parent / "eadaprune")


WIDE = {"COLUMNS": "200", "TERM": "dumb"}  # rich wraps no lines


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [EADAPRUNE, *map(str, arguments)]
    env = environment(**WIDE, EADAPRUNE_SKIP_VERSION_CHECK="")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def without_engine(*arguments: object) -> Result:
    """A command in this process that starts no engine: that activates the plugin for good."""
    env = WIDE | {"VLLM_LOGGING_LEVEL": "INFO"}  # commands silence a vLLM that does not say it
    result = CliRunner().invoke(app, [*map(str, arguments)], env=env)
    assert "eadaprune" not in (named_plugins() or ())
    return result


def refusal(*arguments: object) -> str:
    """What a command says that ends with status 2."""
    result = without_engine(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def kept(server: Server, image: Image.Image, **options: object) -> int:
    body = {"messages": [{"role": "user", "content": content(image)}], "eadaprune": options}
    count: int = server.post("/v1/eadaprune/preview", body).json()["kept_tokens"]
    return count


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Path:
    """Images, and a file that is none."""
    found = tmp_path_factory.mktemp("images of mine")
    for name, image in images.items():
        image.save(found / f"{name}.png")
    (found / "broken.png").write_bytes(b"no image")
    return found


def test_calibrate_finds_the_threshold_whose_mean_the_server_has(
    pruning: Server, folder: Path, images: Images, tmp_path: Path
) -> None:
    files = ["--store", tmp_path / "spectra.jsonl", "--histogram", tmp_path / "budgets.png"]
    arguments = ["calibrate", folder, "--url", pruning.url, "--min-tokens", 4, *files, "--force"]
    first = run(*arguments, "--target", 100 / 576, "--table")
    assert f"skipped {folder / 'broken.png'}: " in first.stderr
    assert "threshold" in first.stdout
    assert "server of demo" in first.stdout
    flags = re.search(r"^--eadaprune-energy (\S+) --eadaprune-min-tokens 4$", first.stdout, re.MULTILINE)
    assert flags
    energy = float(flags[1])
    budgets = [kept(pruning, image, energy=energy, min_tokens=4) for image in images.values()]
    assert f"{sum(budgets) / len(budgets):.1f}" in first.stdout
    # Of eight images a single budget moves the mean by an eighth of a token.
    assert sum(budgets) / len(budgets) == pytest.approx(100, abs=1)
    assert size(tmp_path / "budgets.png") > (400, 200)

    # Another target encodes nothing again.
    encoded = pruning.metric("eadaprune_stage_seconds_count", stage="encode")
    again = run(*arguments, "--target", 50 / 576)
    assert pruning.metric("eadaprune_stage_seconds_count", stage="encode") == encoded
    assert len((tmp_path / "spectra.jsonl").read_text().splitlines()) == 1 + len(images)
    assert energy > float(re.findall(r"--eadaprune-energy (\S+)", again.stdout)[0])

    # Interrupted in the middle of a line: only that image is encoded again.
    text = (tmp_path / "spectra.jsonl").read_text()
    (tmp_path / "spectra.jsonl").write_text(text[:-100])
    assert run(*arguments, "--target", 50 / 576).stdout == again.stdout
    assert pruning.metric("eadaprune_stage_seconds_count", stage="encode") == encoded + 1
    assert sorted((tmp_path / "spectra.jsonl").read_text().splitlines()) == sorted(text.splitlines())


def test_calibrate_with_an_engine_of_its_own(
    pruning: Server, model: Path, folder: Path, images: Images, tmp_path: Path
) -> None:
    files = ["--store", tmp_path / "spectra.jsonl", "--histogram", tmp_path / "budgets.png"]
    arguments = ["calibrate", folder, "--model", model, "--dtype", DTYPE, "--min-tokens", 4, *files, "--force"]
    first = run(*arguments, "--target", 100 / 576)
    assert f"skipped {folder / 'broken.png'}: " in first.stderr
    own = re.escape(f"vllm serve {model} --dtype {DTYPE} --plugin eadaprune")
    flags = re.search(rf"^{own} --eadaprune-energy (\S+) --eadaprune-min-tokens 4$", first.stdout, re.MULTILINE)
    assert flags
    budgets = [kept(pruning, image, energy=float(flags[1]), min_tokens=4) for image in images.values()]
    assert f"{sum(budgets) / len(budgets):.1f}" in first.stdout
    assert sum(budgets) / len(budgets) == pytest.approx(100, abs=1)

    # Another target starts no engine: the spectra are in the store, and a file that is no image needs none.
    again = without_engine(*arguments, "--target", 50 / 576)
    assert again.exit_code == 0, again.output
    assert float(flags[1]) > float(re.findall(r"--eadaprune-energy (\S+)", again.stdout)[0])


def test_calibrate_refuses_what_it_cannot_do(pruning: Server, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "spectra.jsonl"
    arguments = ["calibrate", folder / "flat.png", "--url", pruning.url, "--store", store]
    run(*arguments, "--target", 100 / 576, "--histogram", tmp_path / "budgets.png")  # the others find its spectrum
    few = without_engine(*arguments, "--target", 0.01, "--histogram", tmp_path / "few.png")
    assert few.exit_code == 0
    assert "target 0.01 is not reachable: thresholds keep 0.028 to " in few.stderr
    other = refusal(*arguments, "--target", 0.1, "--scope", "image")
    assert "choose another --store" in other
    notes = tmp_path / "notes.txt"
    notes.write_text("not to be lost")
    strange = [*arguments[:-1], notes]
    assert "choose another --store" in refusal(*strange, "--target", 0.1)
    assert notes.read_text() == "not to be lost"
    bad = refusal(*arguments, "--target", 0.1, "--min-tokens", 0)
    assert "options.min_tokens=0 is not allowed; it must be an integer at least 1" in bad
    nowhere = refusal("calibrate", tmp_path / "none", "--url", pruning.url, "--target", 0.1)
    assert "no images found" in nowhere


@pytest.mark.parametrize("with_server", [True, False])
def test_explain_draws_and_says_what_the_server_decides(
    pruning: Server, model: Path, folder: Path, images: Images, tmp_path: Path, with_server: bool
) -> None:
    picture = tmp_path / "explanation.png"
    whom = ["--url", pruning.url] if with_server else ["--model", model, "--dtype", DTYPE]
    thresholds = ["--energy", 0.9, "--energy", 0.99, "--selector", "attention", "--min-tokens", 16]
    arguments = ["explain", folder / "coffee.png", *whom, "--output", picture, *thresholds]
    found: list[dict[str, Any]] = json.loads(run(*arguments, "--json").stdout)
    assert [report["energy_threshold"] for report in found] == [0.9, 0.99]
    for report in found:
        options = {"energy": report["energy_threshold"], "selector": "attention"}
        assert report["kept_tokens"] == kept(pruning, images["coffee"], **options)
        assert report["selector"] == "attention"
    assert size(picture) > (800, 500)


def test_explain_refuses_what_it_cannot_do(pruning: Server, stock: Server, folder: Path) -> None:
    missing = refusal("explain", folder / "none.png", "--url", pruning.url)
    assert "none.png" in missing
    broken = refusal("explain", folder / "broken.png", "--url", pruning.url)
    assert f"{folder / 'broken.png'}: cannot identify image file " in broken
    bad = refusal("explain", folder / "flat.png", "--url", pruning.url, "--energy", 1.5)
    assert "options.energy=1.5 is not allowed; it must be a number greater than 0 and at most 1" in bad
    assert "is it running with --plugin eadaprune?" in refusal("explain", folder / "flat.png", "--url", stock.url)


def test_the_spectrum_of_a_preview_tells_every_budget(pruning: Server, images: Images) -> None:
    body = {"messages": [{"role": "user", "content": content(images["coffee"])}]}
    (without,) = pruning.post("/v1/eadaprune/preview", body).json()["images"]
    assert without["spectrum"] is None
    (found,) = pruning.post("/v1/eadaprune/preview", body | {"spectrum": True}).json()["images"]
    spectrum = found["spectrum"]
    assert len(spectrum) == found["visual_tokens"]
    assert spectrum == sorted(spectrum)
    # An image of one part: what k tokens hold is the threshold above which one more is needed.
    for k, energy in found["curve"][:-1]:
        assert spectrum[k] == pytest.approx(energy, abs=1e-8)
    for threshold in (0.7, 0.9, 0.99):
        needed = sum(above < threshold + TIE_TOLERANCE for above in spectrum)
        assert kept(pruning, images["coffee"], energy=threshold, min_tokens=1) == needed


def test_evaluate_sends_every_question_with_every_setting(
    pruning: Server, folder: Path, images: Images, tmp_path: Path
) -> None:
    truth = {
        name: pruning.ask(images[name], "What?", options={"energy": 1.0}, ignore_eos=False, max_tokens=32)
        for name in ("coffee", "page", "flat")
    }
    lines = [
        {
            "image": str(folder / f"{name}.png"),
            "question": "What?",
            "group": name,
            "answer": answer.choices[0].message.content,
        }
        for name, answer in truth.items()
    ]
    lines.append({**lines[0], "answer": "something that no random model says"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "quality.json"
    settings = ["--energy", 0.9, "--energy", 0.99, "--target", 0.2, "--tokens", 33]
    settings += ["--selector", "attention", "--selector", "uniform"]
    done = run("evaluate", questions, "--url", pruning.url, "--output", output, "--concurrency", 1, *settings)
    rows: list[dict[str, Any]] = json.loads(output.read_text())["settings"]
    by_name = {row["setting"]: row for row in rows}
    assert len(rows) == 1 + 4 * 2 + 2 + 4 * 2  # none, adaptive, fixed, fixed at the means of the adaptive ones
    whole = by_name["no pruning"]
    assert (whole["accuracy"], whole["mean_tokens"]) == (0.75, 576)
    assert whole["group"]["page"]["accuracy"] == 1
    assert whole["group"]["coffee"]["accuracy"] == 0.5
    adaptive = by_name["energy 0.99, uniform"]
    assert adaptive["group"]["page"]["mean_tokens"] == kept(pruning, images["page"], energy=0.99, selector="uniform")
    assert by_name["33 tokens, attention"]["mean_tokens"] == 33
    default = by_name["the server's default, uniform"]
    assert default["group"]["page"]["mean_tokens"] == kept(pruning, images["page"], selector="uniform")
    assert by_name["target 0.2, uniform"]["group"]["page"]["mean_tokens"] == kept(
        pruning, images["page"], target=0.2, selector="uniform"
    )
    matched = [row for row in rows if "adaptive_minus_fixed" in row]
    assert {row["setting"].split("(as ")[1] for row in matched} == {
        f"{row['setting']})" for row in rows if row["kind"] == "adaptive"
    }
    assert all(name.partition(" (")[0] in done.stdout for name in by_name)
    assert size(output.with_suffix(".png")) > (400, 200)


def test_evaluate_says_what_is_wrong(stock: Server, folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": str(folder / "flat.png"), "question": "What?", "answer": "x"}))
    assert "is it running with --plugin eadaprune?" in refusal("evaluate", questions, "--url", stock.url)
    assert "http://127.0.0.1:9: Connection error" in refusal("evaluate", questions, "--url", "http://127.0.0.1:9")
    questions.write_text(json.dumps({"image": "none.png", "question": "What?", "answer": "x"}))
    assert "none.png" in refusal("evaluate", questions, "--url", stock.url)
