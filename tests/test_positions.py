"""Kept tokens have the M-RoPE positions they have in stock vLLM, and so has the text after them."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import UNPRUNED
from samples import item
from transformers import AutoConfig
from typing_extensions import override
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.frontend.limits import check_positions

CANVAS = "minicpmv4_7"
NAMES = [name for name in UNPRUNED if not name.startswith(CANVAS)]

# Of each token, whether it stays, and is no text.
Tokens = list[tuple[int, bool, bool]]


def text(*tokens: int) -> Tokens:
    return [(token, True, False) for token in tokens]


class Prompt:
    """A prompt of text, images and videos, unpruned and pruned, as vLLM describes it to a model."""

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.name = config, name
        self.begin, self.end = (
            getattr(config, f"{'image' if name.startswith('glm') else 'vision'}_{which}_token_id", 62)
            for which in ("start", "end")
        )
        self.unpruned: list[int] = []
        self.pruned: list[int] = []
        self.left: list[int] = []  # where in the unpruned prompt the tokens of the pruned one are
        self.features: list[tuple[Any, Any]] = []  # of both

    def _add(self, tokens: list[int], stays: list[bool]) -> None:
        for token, stay in zip(tokens, stays, strict=True):
            if stay:
                self.left.append(len(self.unpruned))
                self.pruned.append(token)
            self.unpruned.append(token)

    def text(self, length: int) -> None:
        self._add([50] * length, [True] * length)

    def item(self, modality: str, grid: list[int], kept: list[int]) -> None:
        """``grid`` in patches; ``kept`` of its tokens."""
        frames, height, width = grid
        length, token = height * width // 4, getattr(self.config, f"{modality}_token_id")
        if self.name.startswith("glm"):
            token = self.config.image_token_id
        pads = [(token, index in kept, True) for index in range(frames * length)]
        each = self._with_text(modality, [pads[first : first + length] for first in range(0, len(pads), length)])
        tokens, stays, embeds = map(list, zip(*each, strict=True))
        fields = self.fields(modality, grid) | {f"{modality}_kept": torch.tensor(kept, dtype=torch.int64)}
        data = item(modality, (), **fields)

        def feature(offset: int, is_embed: list[bool]) -> Any:
            mask = None if all(is_embed) else torch.tensor(is_embed)
            position = PlaceholderRange(offset, len(is_embed), mask)
            return MultiModalFeatureSpec(data=data, modality=modality, identifier="x", mm_position=position)

        self._add([self.begin], [True])
        left = [*itertools.compress(embeds, stays)]
        self.features.append((feature(len(self.unpruned), embeds), feature(len(self.pruned), left)))
        self._add(tokens, stays)
        self._add([self.end], [True])

    def _with_text(self, modality: str, frames: list[Tokens]) -> Tokens:
        """The frames of an item, and what is between them."""
        if modality == "image" or not self.name.startswith(("qwen3", "glm")):
            return [*itertools.chain(*frames)]
        each: Tokens = []
        for number, pads in enumerate(frames):
            if self.name.startswith("glm"):
                each += [*text(self.begin), *pads, *text(self.end, 60, 61 + number)]
            else:
                each += [*text(60, 61, 62 + number, self.begin), *pads, *text(self.end)]
        if self.name.startswith("glm"):
            return [*text(self.config.video_start_token_id), *each, *text(self.config.video_end_token_id)]
        return each

    def fields(self, modality: str, grid: Sequence[int]) -> dict[str, torch.Tensor]:
        """What vLLM sends with an item."""
        of_time = {"second_per_grid_ts": torch.tensor(1.5)} if modality == "video" else {}
        return {f"{modality}_grid_thw": torch.tensor(grid)} | of_time

    def positions(self, model_class: type, pruned: bool) -> tuple[torch.Tensor, int]:
        model: Any = object.__new__(model_class)
        torch.nn.Module.__init__(model)
        model.config = self.config
        if hasattr(model, "_init_canvas_mrope"):
            model._init_canvas_mrope(None)
        tokens = self.pruned if pruned else self.unpruned
        found: tuple[torch.Tensor, int] = model.get_mrope_input_positions(
            tokens, [features[pruned] for features in reversed(self.features)]
        )
        return found


class CanvasPrompt(Prompt):
    """The same of MiniCPM-V, to which the first frame of an image is the whole of it, and others are slices, in lines
    of two. Four patches are a token, as a request may have it."""

    @override
    def _with_text(self, modality: str, frames: list[Tokens]) -> Tokens:
        config, each = self.config, text(60)
        for number, pads in enumerate(frames):
            kind = "slice" if modality == "image" and number else "image"
            newline = text(config.newline_id) if kind == "slice" and number > 1 and number % 2 else []
            start, end = (getattr(config, f"{kind}_{which}_id") for which in ("start", "end"))
            each += [*newline, *text(start), *pads, *text(end)]
        return each

    @override
    def fields(self, modality: str, grid: Sequence[int]) -> dict[str, torch.Tensor]:
        frames, *sides = grid
        prefix = "video_" if modality == "video" else ""
        sizes = {f"{prefix}tgt_sizes": torch.tensor([sides] * frames), "video_image_sizes": torch.zeros(frames, 2)}
        return sizes | {f"{prefix}use_vit_merger": torch.tensor([False])}


@pytest.mark.parametrize("name", [*NAMES, CANVAS])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("order", list(itertools.permutations(["image", "video", "text"])))
def test_positions_are_those_of_stock_vllm(
    family: Callable[[str], Path], name: str, share: float, order: tuple[str, ...]
) -> None:
    """``share`` of the tokens stays; at 0 whole frames are empty, and one token of each item is left."""
    config = AutoConfig.from_pretrained(family(name))
    prompt = (CanvasPrompt if name == CANVAS else Prompt)(config, name)
    generator = torch.Generator().manual_seed(0)
    for kind in [*order, "image", "video", "image"]:
        if kind == "text":
            prompt.text(7)
            continue
        grid = [5 if name == CANVAS else 1, 12, 8] if kind == "image" else [4, 6, 8]
        size = grid[0] * grid[1] * grid[2] // 4
        kept = (torch.rand(size, generator=generator) < share).nonzero()[:, 0].tolist() or [size - 1]
        prompt.item(kind, grid, kept)
        prompt.text(3)
    pruned_class = adapter(config.architectures[0])
    stock_class = next(base for base in pruned_class.__mro__ if base.__module__.startswith("vllm."))
    stock, stock_delta = prompt.positions(stock_class, pruned=False)
    ours, delta = prompt.positions(pruned_class, pruned=True)
    assert ours.shape[1] == len(prompt.pruned)
    assert torch.equal(ours, stock[:, prompt.left])
    # What is generated goes on where it would have.
    assert delta + len(prompt.pruned) == stock_delta + len(prompt.unpruned)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 12, 8), (1, 8, 40), (4, 6, 8), (9, 4, 4)])
def test_mrope_span_is_an_upper_bound(family: Callable[[str], Path], name: str, grid: tuple[int, int, int]) -> None:
    """Of an image, exactly so many."""
    config = AutoConfig.from_pretrained(family(name))
    modality = "image" if grid[0] == 1 else "video"
    prompt = Prompt(config, name)
    size = grid[0] * grid[1] * grid[2] // 4
    prompt.item(modality, list(grid), list(range(size)))
    model_class = adapter(config.architectures[0])
    positions, _ = prompt.positions(model_class, pruned=False)
    texts = len(prompt.unpruned) - size  # each takes one
    mrope_span = model_class.eadaprune_layout(config, modality, prompt.fields(modality, grid), size).mrope_span
    taken = int(positions.max()) + 1 - texts
    assert taken == mrope_span if modality == "image" else taken <= mrope_span


@pytest.fixture
def canvas(family: Callable[[str], Path]) -> CanvasPrompt:
    """An image, whole and in slices, and a video, of which tokens stay here and there."""
    prompt = CanvasPrompt(AutoConfig.from_pretrained(family(CANVAS)), CANVAS)
    prompt.item("image", [5, 12, 8], [3, 30, 100])
    prompt.item("video", [4, 6, 8], [1, 40])
    return prompt


@pytest.fixture
def canvas_class(canvas: CanvasPrompt) -> Any:
    return adapter(canvas.config.architectures[0])


def test_mrope_span_is_an_upper_bound_for_a_canvas(canvas: CanvasPrompt, canvas_class: Any) -> None:
    """Because of text that has tokens of slices, vLLM numbers all tokens one after the other, and then it takes as
    many."""
    tokens, mrope_span = 5 * 24 + 4 * 12, 0
    for modality, grid in (("image", (5, 12, 8)), ("video", (4, 6, 8))):
        data, size = canvas.fields(modality, grid), math.prod(grid) // 4
        layout = canvas_class.eadaprune_layout(canvas.config, modality, data, size)
        assert len(layout.part) == size
        mrope_span += layout.mrope_span
    assert mrope_span == tokens
    positions, delta = canvas.positions(canvas_class, pruned=True)
    assert delta + len(canvas.pruned) == int(positions.max()) + 1 < tokens
    canvas._add([canvas.config.slice_start_id, canvas.config.slice_end_id], [True, True])
    positions, delta = canvas.positions(canvas_class, pruned=True)
    assert positions.tolist() == [canvas.left] * 3
    assert delta + len(canvas.pruned) == len(canvas.unpruned) == tokens + len(canvas.pruned) - 5


def test_without_a_canvas_positions_are_consecutive(canvas: CanvasPrompt, canvas_class: Any) -> None:
    canvas.config.mrope_mode = None
    positions, delta = canvas.positions(canvas_class, pruned=True)
    assert positions.tolist() == [[*range(len(canvas.pruned))]] * 3
    assert delta == 0


def test_positions_reach_as_far_as_the_models_table() -> None:
    """Four times its length, YaRN's factor included."""

    def refused(position_slack: int, **rope: Any) -> bool:
        text = SimpleNamespace(max_position_embeddings=1000, rope_parameters=rope)
        model = SimpleNamespace(hf_text_config=text, uses_mrope=True, max_model_len=1000)
        try:
            check_positions(model, position_slack)
        except VLLMValidationError:
            return True
        return False

    assert [refused(position_slack, rope_type="default") for position_slack in (-5, 3000, 3001)] == [False, False, True]
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1000, "factor": 4.0}
    assert [refused(position_slack, **yarn) for position_slack in (15000, 15001)] == [False, True]
