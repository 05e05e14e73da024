"""The tools behind the commands, without a server."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eadaprune_vllm.encoder import whole
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import prune
from eadaprune_vllm.selectors import VisualTokens
from eadaprune_vllm.tools import calibrate, evaluate
from eadaprune_vllm.tools.calibrate import Curve
from eadaprune_vllm.tools.evaluate import Question, Results, Setting


def tokens(flatness: float) -> VisualTokens:
    """40 tokens whose energy is spread over the more directions the flatter."""
    return VisualTokens(torch.randn(40, 60) @ torch.diag(torch.arange(1, 61) ** -flatness), torch.rand(40))


def curves(count: int) -> list[Curve]:
    found = [whole(tokens(1 / (1 + number % 7)), (5, 8)).spectrum("tile") for number in range(count)]
    return [Curve(str(number), spectrum.needed_above) for number, spectrum in enumerate(found)]


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
        encoding = whole(tokens(flatness), (5, 8))
        stored = [round(value, 9) for value in encoding.spectrum("tile").needed_above.tolist()]
        assert Curve("x", torch.tensor(stored, dtype=torch.float64)).budget(chosen) == len(prune(encoding, chosen))


@pytest.mark.parametrize("target", [5.0, 17.3, 31.0])
def test_the_solved_threshold_gives_the_mean_that_was_asked_for(target: float) -> None:
    found, options = curves(50), PruneOptions(min_tokens=2, max_tokens=36)
    solved = calibrate.solve(found, target, options)
    # Of fifty images one budget moves the mean by 1/50; at one millionth of energy no more than a few move.
    assert calibrate.mean(found, solved) == pytest.approx(target, abs=0.05)
    assert (solved.min_tokens, solved.max_tokens) == (2, 36)


def test_a_mean_that_no_threshold_gives_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"can have 4\.0 to 12\.0 tokens in the mean, not 30"):
        calibrate.solve(curves(10), 30, PruneOptions(min_tokens=4, max_tokens=12))


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
    with pytest.raises(ValueError, match="nowhere: no images there"):
        calibrate.find_images(["nowhere"])


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


def test_without_a_selector_the_servers_own_is_asked() -> None:
    (setting,) = evaluate.adaptive([0.9], [])
    assert (setting.name, setting.options, setting.selector) == ("energy 0.9", {"energy": 0.9}, "server's default")
    found = results([1, 0], setting=setting)
    (same,) = evaluate.matched(found)
    assert same.options == evaluate.exactly(10)
    assert [one.name for one in evaluate.fixed([5], ["span", "random"])] == ["5 tokens, span", "5 tokens, random"]


def test_questions_about_one_image_count_as_one_observation() -> None:
    right = [int(value) for value in np.repeat(np.random.default_rng(0).integers(2, size=100), 4)]
    images = np.repeat(np.arange(100), 4)
    low, high = evaluate.interval(np.array(right), images)
    apart_low, apart_high = evaluate.interval(np.array(right), np.arange(400))
    assert (high - low) / (apart_high - apart_low) == pytest.approx(2, rel=0.2)


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert evaluate.normalized(" The  Red. ") == "red"
    assert evaluate.normalized("top-left") == evaluate.normalized("Top left")


def test_a_line_that_is_no_question_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = {"image": "a.png", "question": "What?", "answer": "this", "category": "c"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"image": "a.png"}) + "\n")
    with pytest.raises(ValueError, match=r"q\.jsonl:2: question: Field required; answers: Field required"):
        evaluate.read_questions(path)
    path.write_text(json.dumps(good))
    (found,) = evaluate.read_questions(path)
    assert found == Question(image=str(tmp_path / "a.png"), question="What?", answers=("this",), category="c")
    path.write_text("")
    with pytest.raises(ValueError, match="holds no questions"):
        evaluate.read_questions(path)


def test_chance_is_the_most_frequent_answer() -> None:
    answers = ["yes", "Yes.", "no", "3"]
    asked = [Question(image="a", question="?", answers=(answer,), category="c") for answer in answers]
    assert Results(asked).chance() == {"c": 0.5}
