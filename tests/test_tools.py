"""The tools behind the commands, without a server of vLLM's."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from stub import Stub
from typer.testing import CliRunner, Result

from eadaprune_vllm.cli import app
from eadaprune_vllm.core.budget import Curve, Targets
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import Encoding, prune
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.tools import calibrate, evaluate, images, plots
from eadaprune_vllm.tools.evaluate import Results, Setting
from eadaprune_vllm.tools.questions import Question, normalized, read_questions

EADAPRUNE = str(Path(sys.executable).parent / "eadaprune")


def tokens(flatness: float) -> VisualTokens:
    """40 tokens whose energy is spread over the more directions the flatter."""
    return VisualTokens(torch.randn(40, 60) @ torch.diag(torch.arange(1, 61) ** -flatness), torch.rand(40))


def encoding(flatness: float) -> Encoding:
    return Encoding(tokens(flatness), Layout.whole(5, 8))


def curves(count: int) -> list[Curve]:
    found = [encoding(1 / (1 + number % 7)).spectrum("tile") for number in range(count)]
    return [Curve(str(number), spectrum.thresholds.numpy()) for number, spectrum in enumerate(found)]


@pytest.mark.parametrize(
    "options",
    [
        {"energy": 0.9},
        {"energy": 0.7, "min_tokens": 1},
        {"energy": 0.999, "max_tokens": 20},
        {"energy": 1.0},
        {"enabled": False},
    ],
)
def test_a_stored_curve_gives_the_budget_that_pruning_does(options: dict[str, object]) -> None:
    chosen = PruneOptions.model_validate(options)
    for flatness in (0.2, 0.7, 2.0):
        found = encoding(flatness)
        stored = [round(value, 9) for value in found.spectrum("tile").thresholds.tolist()]
        assert Curve("x", np.array(stored)).budget(chosen) == len(prune(found, chosen))


@pytest.mark.parametrize("target", [0.15, 0.42, 0.8])
def test_solved_threshold_reaches_the_target(target: float) -> None:
    found, options = curves(50), PruneOptions(min_tokens=2, min_share=0, max_tokens=36)
    targets = Targets(found, options)
    assert targets.nearest(target) == target
    solved = options.model_copy(update={"energy": targets.energy(target)})
    # At one millionth of energy no more than a few budgets move.
    assert mean(curve.share(solved) for curve in found) == pytest.approx(target, abs=0.002)


def test_images_are_found_in_folders_globs_and_lists(tmp_path: Path) -> None:
    names = ["a.png", "b.jpg", "deep/er/c.webp"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    every = [str(tmp_path / name) for name in names]
    assert sorted(calibrate.find_images([str(tmp_path)])) == every
    assert calibrate.find_images([str(tmp_path / "*.*g")]) == every[:2]
    lines = ['"a.png"', '{"image": "b.jpg"}', '{"url": "https://example.org/c.png"}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    listed = [*every[:2], "https://example.org/c.png"]
    assert calibrate.find_images([str(tmp_path / "list.jsonl"), every[0]]) == listed
    with pytest.raises(ValueError, match="nowhere: no images found"):
        calibrate.find_images(["nowhere"])


@pytest.mark.parametrize("line", ["a.png", "[]", "{}", '{"image": 1}'])
def test_a_line_of_a_list_that_names_no_image_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'"a.png"\n{line}')
    with pytest.raises(ValueError, match=r"list\.jsonl:2: neither a string nor an object"):
        calibrate.find_images([str(tmp_path / "list.jsonl")])


@pytest.mark.parametrize("name", ["of mine.png", "ä%20.jpg"])
def test_images_are_read_at_paths_and_urls(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.new("L", (8, 6), 200).save(path)
    for where in (str(path), path.as_uri(), images.data_url(path.read_bytes(), name)):
        assert images.read(where) == path.read_bytes()
    found = images.picture(path.read_bytes(), name)
    assert (found.mode, found.size) == ("RGB", (8, 6))
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/a\.png: .*refused"):
        images.read("http://127.0.0.1:9/a.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a file that is none."""
    found = tmp_path / "pictures"
    found.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(found / f"{number}.png")
    (found / "broken.png").write_bytes(b"no image")
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "250", "TERM": "dumb"})


def calibrate_command(folder: Path, *arguments: object) -> list[str]:
    files = ["--store", folder.parent / "spectra.jsonl", "--histogram", folder.parent / "budgets.png"]
    return [*map(str, ["calibrate", folder, *files, "--target", 0.3, *arguments])]


def test_calibrate_asks_a_server_for_spectra(stub: Stub, folder: Path) -> None:
    done = run(*calibrate_command(folder, "--url", f"{stub.url}/", "--max-tokens", 90))
    assert done.exit_code == 0, done.output
    flags = done.stdout.splitlines()[-1].split()
    assert (flags[0], *flags[2:]) == ("--eadaprune-energy", "--eadaprune-max-tokens", "90")
    assert float(flags[1]) == pytest.approx(0.29, abs=0.01)
    assert "Failed to load image: this is none, namely\n" in done.stderr
    header, *lines = map(json.loads, (folder.parent / "spectra.jsonl").read_text().splitlines())
    about = {"models": ["served"], "architecture": "A", "dtype": "float32"}
    assert header == about | {"budget": "spectrum", "scope": "tile"}
    assert [len(line["thresholds"]) for line in lines] == [100] * 3
    # Nothing that a server's bounds might forbid.
    assert [body["eadaprune"] for body in stub.asked] == [{"scope": "tile", "selector": "uniform"}] * 4
    assert stub.images == [(folder / name).read_bytes() for name in ("0.png", "1.png", "2.png", "broken.png")]


def test_budgets_by_span_are_told_from_those_by_the_spectrum(stub: Stub, folder: Path) -> None:
    run(*calibrate_command(folder, "--url", stub.url))
    stub.budget = "span"
    assert "choose another --store" in run(*calibrate_command(folder, "--url", stub.url, "--force")).stderr
    done = run(*calibrate_command(folder, "--url", stub.url, "--store", folder.parent / "others.jsonl", "--force"))
    assert done.stdout.splitlines()[-1].endswith("--eadaprune-budget span")


def test_a_target_that_is_not_reachable_gives_the_nearest(stub: Stub, folder: Path) -> None:
    """The least share here is the server's, as options that are not given are."""
    few = run(*calibrate_command(folder, "--url", stub.url, "--target", 0.02))
    assert few.exit_code == 0, few.output
    assert (
        "target 0.02 is not reachable: thresholds keep 0.040 to 1.000 of the tokens of these images on average; "
        "0.040 is used\n" in few.stderr
    )
    assert " 4.0 " in few.stdout
    many = run(*calibrate_command(folder, "--url", stub.url, "--target", 0.9, "--max-tokens", 60, "--force"))
    assert "0.400 is used, where budgets still differ between images\n" in many.stderr
    assert " 40.0 " in many.stdout


def test_calibrate_says_of_each_image_why_it_was_skipped(stub: Stub, folder: Path) -> None:
    paths = [folder / f"broken {number}.png" for number in range(12)]
    for path in paths:
        path.write_bytes(b"no image")
    done = run(*calibrate_command(folder / "broken *.png", "--url", stub.url))
    assert done.exit_code == 2
    for path in sorted(paths)[:10]:
        assert f"skipped {path}: Failed to load image: this is none, namely\n" in done.stderr
    assert "skipped: 2 more images" in done.stderr
    assert "none of 12 images could be encoded" in done.stderr


def test_a_server_that_ends_ends_calibrate_and_no_spectrum_is_lost(stub: Stub, folder: Path) -> None:
    stub.ends_after = 1
    broken = run(*calibrate_command(folder, "--url", stub.url))
    assert broken.exit_code == 2
    assert "Server disconnected" in broken.stderr
    assert "skipped" not in broken.stderr
    stub.ends_after = None
    assert run(*calibrate_command(folder, "--url", stub.url)).exit_code == 0
    assert stub.images.count((folder / "0.png").read_bytes()) == 1
    assert len(stub.asked) == 4


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, '{"error": "Unauthorized"}', ": Unauthorized; the server does not accept the API key in OPENAI_API_KEY"),
        (404, '{"detail": "Not Found"}', ": no vLLM server at this address"),
        (403, '{"error": {"message": "not you"}}', ": not you"),
    ],
)
def test_server_errors_end_the_command(stub: Stub, folder: Path, status: int, body: str, words: str) -> None:
    stub.failing = status, body
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"image": "0.png", "question": "What?", "answer": "x"}))
    evaluate = ["evaluate", str(questions), "--output", str(folder / "quality.json")]
    for command in (calibrate_command(folder), ["explain", str(folder / "0.png")], evaluate):
        done = run(*command, "--url", stub.url)
        assert done.exit_code == 2
        assert stub.url + words in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (503, "over there", ": 503 Service Unavailable"),
        (200, "{}", " runs an incompatible version of the plugin"),
        (200, "<html>", " runs something else than vLLM"),
    ],
)
def test_servers_of_another_kind_end_the_command(stub: Stub, folder: Path, status: int, body: str, words: str) -> None:
    stub.failing = status, body
    done = run("explain", folder / "0.png", "--url", stub.url)
    assert done.exit_code == 2
    assert stub.url + words in done.stderr


def test_evaluate_names_the_image_that_the_server_rejects(stub: Stub, folder: Path) -> None:
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"image": "0.png", "question": "What?", "answer": "x"}))
    stub.refuses = '{"error": {"message": "cannot identify image file <_io.BytesIO object>"}}'
    command = ["evaluate", questions, "--output", folder / "quality.json", "--url", f"{stub.url}/v1"]
    assert f"{folder / '0.png'}: cannot identify image file " in run(*command).stderr
    done = run(*command[:-1], f"{stub.url}/v1/v1")
    assert f"{stub.url}/v1: no vLLM server at this address" in done.stderr


@pytest.mark.parametrize(
    "budgets", [[94], [64] * 8, [64, 64, 113], [1, 576], [576], list(range(40, 340))], ids=lambda each: str(each[:3])
)
def test_histogram_has_whole_numbers_and_every_image(budgets: list[int]) -> None:
    figure = plots.histogram(budgets, "title")
    figure.canvas.draw()
    (axes,) = figure.axes
    assert sum(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle)) == len(budgets)
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        assert all(tick == round(tick) for tick in ticks)
    low, high = axes.get_xlim()
    assert 0 <= low < min(budgets) <= max(budgets) < high
    assert high - low >= 20


@pytest.mark.parametrize("tokens", [[113.0], [64.0, 111.6], [16.0, 33.0, 144.0]])
def test_plot_of_accuracy_has_ticks_and_no_accuracy_above_one(tokens: list[float]) -> None:
    row = {"selector": "span", "accuracy": 1.0, "interval": (0.9, 1.0), "group": {"all": {}}}
    rows = [row | {"kind": "none", "mean_tokens": 576.0}]
    rows += [row | {"kind": "adaptive", "mean_tokens": mean_tokens} for mean_tokens in tokens]
    figure = plots.accuracy(rows)
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2
    assert axes.get_ylim()[1] <= 1.02


def test_the_package_is_the_command(tmp_path: Path) -> None:
    for arguments in (["demo-model"], ["--help"], ["explain", "--help"]):
        done = subprocess.run([sys.executable, "-m", "eadaprune_vllm", *arguments], capture_output=True, text=True)
        command = subprocess.run([EADAPRUNE, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, command.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --url of a server, or --model"),
        (["--url", "http://127.0.0.1:9", "--model", "m"], "give either --url of a server, or --model"),
        (["--url", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype and --revision need --model"),
        (["--url", "http://127.0.0.1:9", "--revision", "main"], "--dtype and --revision need --model"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9: Connection refused"),
        (["--url", "127.0.0.1"], "missing an 'http://' or 'https://' protocol"),
    ],
)
def test_url_and_model_exclude_each_other(folder: Path, arguments: list[str], words: str) -> None:
    for command in (calibrate_command(folder), ["explain", str(folder / "0.png")]):
        done = run(*command, *arguments)
        assert done.exit_code == 2
        assert words in done.stderr


def test_with_a_server_nothing_of_torch_or_vllm_is_imported(stub: Stub, folder: Path) -> None:
    """In a process of its own. ``evaluate``, too, has its model elsewhere."""
    script = """
import json, sys
import eadaprune_vllm.tools.evaluate
from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.cli import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
print(sorted({"torch", "vllm", "transformers"} & {name.partition(".")[0] for name in sys.modules}))
"""
    picture = str(folder.parent / "explanation.png")
    explain = ["explain", str(folder / "0.png"), "--url", stub.url, "--output", picture]
    commands = json.dumps([calibrate_command(folder, "--url", stub.url, "--table"), explain])
    done = subprocess.run([sys.executable, "-c", script, commands], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(stub.asked) == 4 + 1
    with Image.open(picture) as drawn:
        assert drawn.size > (800, 500)


def test_the_servers_refusal_of_an_image_is_shown(stub: Stub, folder: Path) -> None:
    stub.refuses = '{"error": {"message": "too large: <PIL.Image.Image image object at 0x7f>"}}'
    done = run("explain", folder / "0.png", "--url", stub.url)
    assert done.exit_code == 2
    assert "Invalid value: too large: " in done.stderr
    assert "0x7f" not in done.stderr


@pytest.mark.parametrize(
    ("name", "says"), [("broken.png", "cannot identify image file"), ("none.png", "No such file or directory")]
)
def test_commands_name_an_image_that_they_cannot_read(stub: Stub, folder: Path, name: str, says: str) -> None:
    done = run("explain", folder / name, "--url", stub.url)
    assert done.exit_code == 2
    assert f"Invalid value: {folder / name}: {says} " in done.stderr
    path = folder / "questions.jsonl"
    question = {"image": "0.png", "question": "What?", "answer": "x"}
    path.write_text("\n".join(json.dumps(question | {"image": each}) for each in ("0.png", *[name] * 7)))
    done = run("evaluate", path, "--url", stub.url, "--output", folder / "quality.json")
    assert done.exit_code == 2
    said = " ".join(done.stderr.replace("│", "").split())
    for line in range(2, 7):
        assert f"{path}:{line}: {folder / name}: {says}; " in said
    assert "and 2 more lines" in said
    assert not stub.asked


def test_no_command_overwrites_a_file_unless_told_to(stub: Stub, folder: Path) -> None:
    output = folder.parent / "out.png"
    output.write_text("mine")
    commands = [
        ["explain", folder / "0.png", "--url", stub.url, "--output", output],
        [*calibrate_command(folder, "--url", stub.url), "--histogram", output],
        ["evaluate", folder / "questions.jsonl", "--url", stub.url, "--output", output.with_suffix(".json")],
    ]
    for command in commands:
        done = run(*command)
        assert done.exit_code == 2
        assert f"{output} would be overwritten; --force does so" in done.stderr
    assert output.read_text() == "mine"
    assert not stub.asked
    for command in commands[:2]:
        output.write_text("mine")
        assert run(*command, "--force").exit_code == 0
        with Image.open(output) as drawn:
            assert drawn.size > (400, 200)
    (folder / "questions.jsonl").write_text("mine")
    assert "--force does so" in run("demo-questions", folder, "--scenes", 1).stderr
    assert run("demo-questions", folder, "--scenes", 1, "--force").exit_code == 0
    assert len(read_questions(folder / "questions.jsonl")) > 1


def test_folders_of_outputs_are_made(stub: Stub, folder: Path) -> None:
    output = folder / "a" / "b" / "picture.png"
    assert run("explain", folder / "0.png", "--url", stub.url, "--output", output).exit_code == 0
    assert output.exists()
    assert "a/b is a folder" in run("explain", folder / "0.png", "--url", stub.url, "--output", output.parent).stderr


def results(*right: list[int], per_image: int = 1, **settings: Setting) -> Results:
    """Questions, ``per_image`` about each image, and which each setting answered right."""
    asked = [Question(image=str(number // per_image), question="?", answers=("1",)) for number in range(len(right[0]))]
    found = Results(asked, list(settings.values()))
    for setting, answers in zip(settings.values(), right, strict=True):
        found.correct[setting.name] = np.array(answers, dtype=bool)
        found.kept[setting.name] = np.full(len(answers), 10)
    return found


def test_adaptive_is_compared_to_fixed_question_by_question() -> None:
    adaptive = Setting("adaptive", "adaptive", {})
    fixed = Setting("fixed", "fixed", {}, matched="adaptive")
    right = np.random.default_rng(0).integers(2, size=400)
    worse = right & (np.arange(400) % 10 != 0)  # right where adaptive is, but for one in twenty questions
    row = results(right.tolist(), worse.tolist(), adaptive=adaptive, fixed=fixed).summary()[1]
    gain = row["adaptive_minus_fixed"]
    assert gain["mean"] == pytest.approx((right - worse).mean())
    # Unpaired, the interval of each accuracy alone is wider than the whole difference.
    assert 0 < gain["interval"][0] < gain["mean"] < gain["interval"][1] < 0.1
    assert row["interval"][1] - row["interval"][0] > 0.08


def test_without_a_selector_the_servers_is_used() -> None:
    (setting,) = evaluate.adaptive([0.9], [])
    assert (setting.name, setting.options, setting.selector) == ("energy 0.9", {"energy": 0.9}, "server's default")
    found = results([1, 0], setting=setting)
    (same,) = evaluate.matched(found)
    assert same.options == evaluate.exactly(10)
    (of_target,) = evaluate.matched(results([1, 0], setting=evaluate.adaptive([], [], [0.2])[0]))
    assert of_target.options == evaluate.exactly(10)
    assert [one.options for one in evaluate.default(["span"])] == [{"selector": "span"}]
    assert [one.name for one in evaluate.fixed([5], ["span", "random"])] == ["5 tokens, span", "5 tokens, random"]


def test_questions_about_one_image_count_as_one_observation() -> None:
    right = [int(value) for value in np.repeat(np.random.default_rng(0).integers(2, size=100), 4)]
    images = np.repeat(np.arange(100), 4)
    low, high = evaluate.interval(np.array(right), images)
    apart_low, apart_high = evaluate.interval(np.array(right), np.arange(400))
    assert (high - low) / (apart_high - apart_low) == pytest.approx(2, rel=0.2)


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert normalized(" The  Red. ") == "red"
    assert normalized("top-left") == normalized("Top left")


def test_error_names_the_invalid_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "What?", "answer": "this", "category": "c"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"image": "a.png"}) + "\n")
    with pytest.raises(ValueError, match=r"q\.jsonl:2: question: Field required, answers: Field required$"):
        read_questions(path)
    path.write_text(json.dumps(good))
    (found,) = read_questions(path)
    assert found == Question(image=str(tmp_path / "a.png"), question="What?", answers=("this",), category="c")
    path.write_text("")
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(path)


def test_chance_is_the_most_frequent_answer() -> None:
    answers = ["yes", "Yes.", "no", "3"]
    asked = [Question(image="a", question="?", answers=(answer,), category="c") for answer in answers]
    assert Results(asked).chance() == {"c": 0.5}
