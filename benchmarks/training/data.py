"""Scenes and questions as the embedded model learns from them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from string import ascii_lowercase
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ImageFont
from tokenizers import models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from eadaprune_vllm.demo.model import SPECIAL, byte_level, fast
from eadaprune_vllm.demo.questions import CATEGORIES, questions
from eadaprune_vllm.demo.scenes import COLOURS, PLACES, SHAPES, SIDE, WORDS, Scene, Thing, make_scene

PATCH = 14
GRID = SIDE // PATCH
_, BOS, EOS, PAD, IMAGE = range(len(SPECIAL) + 1)  # a trained tokenizer numbers them first
NAMES = [*SHAPES, *map(str, range(10)), *WORDS]
PAIRS = [(colour, name) for colour in COLOURS for name in SHAPES]
PRESENT: list[Any] = [*PAIRS, *NAMES[len(SHAPES) :]]  # what the CLS token learns to tell
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and pairs that are frequent in questions and answers."""
    random = np.random.default_rng(0)
    texts = [
        f"\n{question.text} ASSISTANT: {question.answer}"
        for seed in range(400)
        for question in questions(make_scene(seed, held_out=False), random)
    ]
    texts += [f" {name}" for name in NAMES] * 20
    tokenizer = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=[*SPECIAL, "<image>"], initial_alphabet=alphabet)
    )
    return fast(tokenizer)


@dataclass(frozen=True)
class Looks:
    """What a scene, or a window of it, looks like; with a leading dimension several.

    Attributes:
        pixels: ``[3, H, W]`` uint8.
        patches: ``[N]``, which of the whole scene's patches these are.
        names, colours: ``[N]``, what each patch shows, 0 for nothing.
        letters: ``[N, 26]``, whether a patch shows some of that letter of a word.
        centres: ``[N]``, whether the middle of a thing is there.
        present: ``[len(PRESENT)]``, whether the scene has it.
    """

    pixels: torch.Tensor
    patches: torch.Tensor
    names: torch.Tensor
    colours: torch.Tensor
    letters: torch.Tensor
    centres: torch.Tensor
    present: torch.Tensor


@dataclass(frozen=True)
class Asked:
    """Questions about a scene with their answers, one after the other; with a leading dimension about several.

    Attributes:
        tokens: ``[T]``.
        targets: ``[T]``, the token to come where it is part of an answer.
        question: ``[T]``, number of the question that a token is of, -1 for padding.
        position: ``[T]``, within that question.
        category: ``[T]``, index into ``CATEGORIES``.
        last: ``[Q]``, which token is the last before a question's answer.
        about: ``[Q, N]``, whether a patch shows what a question is about.
        subject: ``[Q, 3]``, of a question about one thing what it is, its colour and which of nine places it is in,
            else ``IGNORED``.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    position: torch.Tensor
    category: torch.Tensor
    last: torch.Tensor
    about: torch.Tensor
    subject: torch.Tensor


_Some = TypeVar("_Some", Looks, Asked)


class Windows(IterableDataset[Looks]):
    """Of scenes of ascending seeds: windows of ``side`` patches, the whole if that many."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side

    def __iter__(self) -> Iterator[Looks]:
        seed = self.seed
        while True:
            left, top = np.random.default_rng((seed, 1)).integers(GRID - self.side + 1, size=2).tolist()
            within = (left * PATCH, top * PATCH, (left + self.side) * PATCH, (top + self.side) * PATCH)
            yield look(make_scene(seed, held_out=False, within=within), within)
            seed += 1


def look(scene: Scene, within: tuple[int, int, int, int] = (0, 0, SIDE, SIDE)) -> Looks:
    """Args:
    scene: has nothing outside of ``within``.
    within: left, top, right and bottom, in pixels, multiples of ``PATCH``.
    """
    left, top, right, bottom = (edge // PATCH for edge in within)
    window = slice(top, bottom), slice(left, right)
    names, colours, centres = torch.zeros(3, GRID, GRID, dtype=torch.long)
    letters = torch.zeros(GRID, GRID, len(ascii_lowercase))
    for thing in scene.things:
        inside = _patches(thing.box)
        names[inside], colours[inside] = 1 + NAMES.index(thing.name), 1 + list(COLOURS).index(thing.colour)
        x, y = ((thing.box[i] + thing.box[i + 2]) // 2 // PATCH for i in (0, 1))
        centres[y, x] = 1
        for letter, box in _letters(thing):
            letters[*_patches(box), ascii_lowercase.index(letter)] = 1
    has: set[Any] = {(t.colour, t.name) if t.kind == "shape" else t.name for t in scene.things}
    return Looks(
        torch.from_numpy(np.array(scene.image.crop(within))).permute(2, 0, 1),
        torch.arange(GRID**2).view(GRID, GRID)[window].flatten(),
        names[window].flatten(),
        colours[window].flatten(),
        letters[window].flatten(0, 1),
        centres[window].flatten().float(),
        torch.tensor([float(each in has) for each in PRESENT]),
    )


def ask(tokenizer: PreTrainedTokenizerFast, scene: Scene, random: np.random.Generator, each: int = 2) -> Asked:
    """Up to ``each`` questions of every category about a whole scene."""
    columns: dict[str, list[int]] = {key: [] for key in ("tokens", "targets", "question", "position", "category")}
    asked = questions(scene, random, each)
    about = torch.zeros(len(asked), GRID, GRID, dtype=torch.bool)
    last, subjects = [], []
    for number, question in enumerate(asked):
        for thing in question.about:
            about[number][_patches(thing.box)] = True
        subjects.append(_subject(*question.about) if len(question.about) == 1 else [IGNORED] * 3)
        prompt = _ids(tokenizer, f"\n{question.text} ASSISTANT:")
        answer = [*_ids(tokenizer, f" {question.answer}"), EOS]
        length = len(prompt) + len(answer)
        last.append(len(columns["tokens"]) + len(prompt) - 1)
        columns["tokens"] += prompt + answer
        columns["targets"] += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
        columns["question"] += [number] * length
        columns["position"] += range(length)
        columns["category"] += [CATEGORIES.index(question.category)] * length
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    return Asked(**tensors, last=torch.tensor(last), about=about.flatten(1), subject=torch.tensor(subjects))


def _subject(thing: Thing) -> list[int]:
    column, row = ((thing.box[i] + thing.box[i + 2]) * len(PLACES) // (2 * SIDE) for i in (0, 1))
    return [NAMES.index(thing.name), list(COLOURS).index(thing.colour), row * len(PLACES) + column]


@cache  # texts recur
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _patches(box: tuple[float, float, float, float]) -> tuple[slice, slice]:
    """Rows and columns that it covers, at least one."""
    x0, y0, x1, y1 = (round(edge / PATCH) for edge in box)
    return slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))


def _letters(thing: Thing) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """A word's letters, and where they are."""
    if thing.kind == "word":
        left, top, right, bottom = thing.box
        edges = [left + (right - left) * edge for edge in _edges(thing.name)]
        for letter, (start, end) in zip(thing.name, pairwise(edges), strict=True):
            yield letter, (start, top, end, bottom)


@cache
def _edges(word: str) -> list[float]:
    """Where its letters start and the last one ends, as shares of its width."""
    font = ImageFont.load_default(100)
    return [font.getlength(word[:count]) / font.getlength(word) for count in range(len(word) + 1)]


def collate(samples: list[_Some]) -> _Some:
    """Several as one; of questions there are then as many as the longest has, the rest padding."""
    padding = {"tokens": PAD, "targets": IGNORED, "question": -1, "position": 0, "category": -1}
    padding |= {"last": 0, "about": 0, "subject": IGNORED}
    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(samples[0])}
    return type(samples[0])(
        **{
            name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding[name])
            if name in padding
            else torch.stack(column)
            for name, column in columns.items()
        }
    )
