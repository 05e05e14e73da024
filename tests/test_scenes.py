"""The generated scenes and their questions: one right answer each, none much likelier than others."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eadaprune_vllm.demo.questions import CATEGORIES, Question, questions, write_questions
from eadaprune_vllm.demo.run import PHASES, SETTINGS, Phases, next_steps
from eadaprune_vllm.demo.scenes import COLOURS, DENSITIES, SHAPES, SIDE, Scene, Thing, make_scene


def ask(scene: Scene, each: int = 2) -> list[Question]:
    return questions(scene, np.random.default_rng(0), each)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, held_out=True) for seed in range(150)]


def test_scene_is_determined_by_its_seed() -> None:
    first, again, other = make_scene(5, True), make_scene(5, True), make_scene(5, False)
    assert first.things == again.things
    assert first.image.tobytes() == again.image.tobytes()
    assert first.things != other.things


def test_things_lie_apart_within_the_image(scenes: list[Scene]) -> None:
    for scene in scenes:
        taken = np.zeros((SIDE, SIDE), bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert not taken[top:bottom, left:right].any()
            taken[top:bottom, left:right] = True
            # Its colour is what one sees there.
            pixels = np.asarray(scene.image)[top:bottom, left:right].reshape(-1, 3).astype(int)
            assert (np.abs(pixels - COLOURS[thing.colour]).max(1) < 12).mean() > 0.1
    assert {scene.density for scene in scenes} == set(DENSITIES)
    assert max(len(scene.things) for scene in scenes) > 20


def matching(scene: Scene, words: str) -> list[Thing]:
    """The things that a phrase such as "red star", "digit 7" or "blue word apple" may mean."""
    said = set(words.split())
    return [
        thing
        for thing in scene.things
        if said <= {thing.colour, thing.name, *([thing.kind] if thing.kind != "shape" else [])}
    ]


def test_every_question_has_exactly_one_right_answer(scenes: list[Scene]) -> None:
    seen = Counter[str]()
    for scene in scenes:
        for question in ask(scene):
            seen[question.category] += 1
            if found := re.fullmatch(r"How many (\w+) are there\?", question.text):
                name = next(shape for shape in SHAPES if found[1] in (f"{shape}s", f"{shape}es"))
                assert len(matching(scene, name)) == int(question.answer)
            elif found := re.fullmatch(r"How many (\w+) shapes are there\?", question.text):
                assert sum(t.kind == "shape" for t in matching(scene, found[1])) == int(question.answer)
            elif found := re.fullmatch(r"What colour is the (.+)\?", question.text):
                (thing,) = matching(scene, found[1])
                assert thing.colour == question.answer
            elif found := re.fullmatch(r"Where is the (.+)\?", question.text):
                (thing,) = matching(scene, found[1])
                assert thing.place == question.answer
            elif found := re.fullmatch(r"What is the (digit|word) at the (.+)\?", question.text):
                (thing,) = (t for t in scene.things if (t.kind, t.place) == (found[1], found[2]))
                assert thing.name == question.answer
            elif found := re.fullmatch(r"What is the (\w+ (?:digit|word))\?", question.text):
                (thing,) = matching(scene, found[1])
                assert thing.name == question.answer
            elif found := re.fullmatch(r"Is there an? (.+)\?", question.text):
                assert (question.answer == "yes") == bool(matching(scene, found[1]))
            else:
                raise AssertionError(question)
    assert set(seen) == set(CATEGORIES)
    assert min(seen.values()) > 100


def test_question_is_about_the_thing_that_gives_its_answer(scenes: list[Scene]) -> None:
    for scene in scenes:
        for question in ask(scene):
            if question.category == "count":
                assert len(question.about) == int(question.answer)
            elif question.category == "yes/no":
                assert bool(question.about) == (question.answer == "yes")
            else:
                (thing,) = question.about
                assert question.answer in (thing.colour, thing.place, thing.name)
            assert set(question.about) <= set(scene.things)


def test_no_answer_is_much_likelier_than_others(scenes: list[Scene]) -> None:
    answers = {category: Counter[str]() for category in CATEGORIES}
    for scene in scenes:
        for question in ask(scene, each=4):
            answers[question.category][question.answer] += 1
    most = {"count": 0.45, "colour": 0.25, "position": 0.25, "digit": 0.2, "word": 0.1, "yes/no": 0.55}
    for category, found in answers.items():
        assert max(found.values()) / found.total() < most[category], found


def test_question_sets_are_files_that_evaluate_takes(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "set", scenes=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["image"] for line in lines} == {"00000.png", "00001.png", "00002.png"}
    with Image.open(path.parent / "00002.png") as image:
        assert image.size == (SIDE, SIDE)
    assert {line["category"] for line in lines} <= set(CATEGORIES)
    assert {line["group"] for line in lines} <= set(DENSITIES)


def test_the_demo_says_each_phase_of_a_start_once() -> None:
    said: list[str] = []
    phases, log = Phases(said.append), ""
    for marker in ("", "", *PHASES, "Starting to load model"):
        log += f"{marker} ...\n"
        phases(log)
    assert said == list(PHASES.values())


def test_the_documents_name_the_energies_of_the_demo() -> None:
    (header,) = re.findall(r"^\| image \| (.*) \|$", (Path(__file__).parent.parent / "README.md").read_text(), re.M)
    assert re.findall(r"default|0\.\d+", header) == list(SETTINGS)[1:]


def test_the_demo_names_programs_that_exist() -> None:
    programs = re.findall(r"(\S+/(?:vllm|eadaprune)) ", next_steps().replace("$(", ""))
    assert len(programs) == 5
    assert all(Path(program.strip('"')).exists() for program in programs)
