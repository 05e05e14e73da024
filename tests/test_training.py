"""The training of the embedded model: what it shows the model is what a server will."""

import copy
import dataclasses
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from data import GRID, IGNORED, NAMES, PATCH, Sample, Scenes, collate, make_tokenizer
from learner import Learner
from transformers import PreTrainedTokenizerFast

from eadaprune_vllm.demo.scenes import SIDE, make_scene


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def learner(tokenizer: PreTrainedTokenizerFast) -> Learner:
    torch.manual_seed(0)
    return Learner(tokenizer).eval()


@pytest.fixture(scope="module")
def model(learner: Learner) -> Any:
    """The same weights, computed by transformers alone."""
    model = copy.deepcopy(learner.llava)
    model.set_attn_implementation("sdpa")
    return model.model


@pytest.fixture(scope="module")
def batch(tokenizer: PreTrainedTokenizerFast) -> Sample:
    scenes = iter(Scenes(tokenizer, 10, GRID))
    return collate([next(scenes) for _ in range(2)])


def test_labels_lie_where_things_are(batch: Sample) -> None:
    for number, names in enumerate(batch.names.view(2, GRID, GRID)):
        for thing in make_scene(10 + number, held_out=False).things:
            x, y = ((thing.box[i] + thing.box[i + 2]) / 2 / SIDE * GRID for i in (0, 1))
            assert NAMES[names[int(y), int(x)] - 1] == thing.name
            assert batch.centres[number].view(GRID, GRID)[int(y), int(x)] == 1
    assert batch.centres.sum() <= sum(len(make_scene(10 + number, held_out=False).things) for number in range(2))


def test_letters_are_those_of_words_from_left_to_right(tokenizer: PreTrainedTokenizerFast) -> None:
    seen = 0
    for seed in range(40):
        letters = next(iter(Scenes(tokenizer, seed, GRID))).letters.view(GRID, GRID, 26)
        for thing in make_scene(seed, held_out=False).things:
            if thing.kind == "word":
                seen += 1
                row = letters[(thing.box[1] + thing.box[3]) // 2 // PATCH]
                ends = thing.box[0] // PATCH, (thing.box[2] - 1) // PATCH
                found = row[ends[0] : ends[1] + 1].argmax(-1)[row[ends[0] : ends[1] + 1].any(-1)]
                assert {ascii_lowercase[index] for index in found} <= set(thing.name)
                assert row[:, ascii_lowercase.index(thing.name[0])][ends[0] : ends[0] + 3].any()
                assert row[:, ascii_lowercase.index(thing.name[-1])][ends[1] - 2 : ends[1] + 1].any()
    assert seen > 20


def test_a_window_is_a_cut_of_the_whole_grid(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = next(iter(Scenes(tokenizer, 3, 12)))
    assert sample.pixels.shape == (3, SIDE // 2, SIDE // 2)
    rows = sample.patches.view(12, 12)
    assert (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert (rows[1:] - rows[:-1] == GRID).all()


def test_the_tower_is_what_a_server_runs(learner: Learner, model: Any, batch: Sample) -> None:
    """Without heads and windows it is transformers' own."""
    pixels = (batch.pixels / 255 - learner.mean) / learner.std
    with torch.inference_mode():
        features, _ = learner.tower(batch.pixels, batch.patches)
        reference = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, reference, atol=1e-4, rtol=1e-4)


def test_a_question_sees_the_image_and_itself(
    learner: Learner, model: Any, batch: Sample, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its answer is that of a prompt of its own, and does not depend on the other questions."""
    own = (batch.question[0] == 3) & (batch.targets[0] != IGNORED)
    asked = batch.targets[0][batch.question[0] == 3] == IGNORED  # one less before the answer, one after it
    prompt = batch.tokens[0][batch.question[0] == 3][: int(asked.sum())]
    with torch.inference_mode():
        features, _ = learner.tower(batch.pixels[:1], batch.patches[:1])
        image = learner.llava.model.multi_modal_projector(features)
        one = Sample(*(getattr(batch, f.name)[:1] for f in dataclasses.fields(batch)))
        states, _ = learner._language(image, one, jitter=False)
        together = learner.llava.lm_head(states[0])[own][0]
        embed = learner.llava.model.language_model.embed_tokens
        alone = torch.cat((embed(learner.prefix)[None], image, embed(prompt)[None]), 1)
        hidden = model.language_model(inputs_embeds=alone).last_hidden_state[0, -1]
        expected = learner.llava.lm_head(hidden)
    torch.testing.assert_close(together, expected, atol=1e-3, rtol=1e-3)
    assert tokenizer.decode(prompt).endswith("ASSISTANT:")
