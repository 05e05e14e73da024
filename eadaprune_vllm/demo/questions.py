"""Questions about generated scenes, each with one right answer."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eadaprune_vllm.demo.scenes import COLOURS, SHAPES, Scene, Thing, make_scene

QUESTIONS = "questions.jsonl"  # file in a folder of generated scenes
CATEGORIES = ("count", "colour", "position", "digit", "word", "yes/no")


@dataclass(frozen=True)
class Question:
    """Attributes:
    about: the things whose looks give the answer; none where it is that there is no such thing.
    """

    category: str
    text: str
    answer: str
    about: tuple[Thing, ...]


def questions(scene: Scene, random: np.random.Generator, each: int = 2) -> list[Question]:
    """Up to ``each`` questions of every category, as far as the scene has something to ask."""
    found = []
    for category, ask in _ASK.items():
        candidates = list(ask(scene, random))
        for index in random.permutation(len(candidates))[:each]:
            text, answer, about = candidates[index]
            found.append(Question(category, text, answer, tuple(about)))
    return found


_Asked = Iterator[tuple[str, str, list[Thing]]]


def _count(scene: Scene, random: np.random.Generator) -> _Asked:
    """One for each number of things that the scene has an example of, so that no answer is much likelier."""
    shapes = [thing for thing in scene.things if thing.kind == "shape"]
    by_answer: dict[int, list[tuple[str, list[Thing]]]] = {}
    for plural, group in (
        *((_plural(name), [t for t in shapes if t.name == name]) for name in SHAPES),
        *((f"{colour} shapes", [t for t in shapes if t.colour == colour]) for colour in COLOURS),
    ):
        if len(group) <= 6:
            by_answer.setdefault(len(group), []).append((plural, group))
    for number, groups in by_answer.items():
        plural, group = groups[random.integers(len(groups))]
        yield f"How many {plural} are there?", str(number), group


def _colour(scene: Scene, random: np.random.Generator) -> _Asked:
    names = Counter((thing.kind, thing.name) for thing in scene.things)
    for thing in scene.things:
        if names[thing.kind, thing.name] == 1:
            yield f"What colour is the {_noun(thing)}?", thing.colour, [thing]


def _position(scene: Scene, random: np.random.Generator) -> _Asked:
    names = Counter((thing.kind, thing.name, thing.colour) for thing in scene.things)
    for thing in scene.things:
        if thing.place and names[thing.kind, thing.name, thing.colour] == 1:
            yield f"Where is the {thing.colour} {_noun(thing)}?", thing.place, [thing]


def _read(kind: str) -> Callable[[Scene, np.random.Generator], _Asked]:
    def ask(scene: Scene, random: np.random.Generator) -> _Asked:
        group = [thing for thing in scene.things if thing.kind == kind]
        places = Counter(thing.place for thing in group)
        colours = Counter(thing.colour for thing in group)
        for thing in group:
            if colours[thing.colour] == 1:
                yield f"What is the {thing.colour} {kind}?", thing.name, [thing]
            if thing.place and places[None] == 0 and places[thing.place] == 1:
                yield f"What is the {kind} at the {thing.place}?", thing.name, [thing]

    return ask


def _yes_no(scene: Scene, random: np.random.Generator) -> _Asked:
    """As many of either answer. Half of what is denied has a colour and a shape that the scene has, of others."""
    pairs = {(thing.colour, thing.name) for thing in scene.things if thing.kind == "shape"}
    if not pairs:
        return
    present = sorted(pairs)
    colours, names = sorted({c for c, _ in pairs}), sorted({n for _, n in pairs})
    near = [(c, n) for c in colours for n in names if (c, n) not in pairs]
    absent = [(c, n) for c in COLOURS for n in SHAPES if (c, n) not in pairs]
    if not absent:
        return
    for answer, some in (("yes", present), ("no", near or absent), ("yes", present), ("no", absent)):
        colour, name = some[random.integers(len(some))]
        about = [thing for thing in scene.things if (thing.colour, thing.name) == (colour, name)]
        yield f"Is there {'an' if colour == 'orange' else 'a'} {colour} {name}?", answer, about


_ASK: dict[str, Callable[[Scene, np.random.Generator], _Asked]] = {
    "count": _count,
    "colour": _colour,
    "position": _position,
    "digit": _read("digit"),
    "word": _read("word"),
    "yes/no": _yes_no,
}


def _noun(thing: Thing) -> str:
    return thing.name if thing.kind == "shape" else f"{thing.kind} {thing.name}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def write_questions(folder: Path, scenes: int) -> Path:
    """Held-out scenes as PNGs, and a file of questions about them as ``eadaprune evaluate`` takes it.

    Args:
        folder: is made.
        scenes: how many; there are up to twelve questions about each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / QUESTIONS
    with path.open("w") as file:
        for seed in range(scenes):
            scene, image = make_scene(seed, held_out=True), f"{seed:05d}.png"
            scene.image.save(folder / image)
            for question in questions(scene, np.random.default_rng((seed, 1))):
                line = {"image": image, "question": question.text, "answer": question.answer}
                file.write(json.dumps(line | {"category": question.category, "group": scene.density}) + "\n")
    return path
