"""The training of the embedded model: what it shows the model is what a server will."""

import copy
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from data import GRID, IGNORED, NAMES, PATCH, Asked, Looks, Windows, ask, collate, look, make_tokenizer
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


SCENES = [make_scene(seed, held_out=False) for seed in (10, 11)]


@pytest.fixture(scope="module")
def looks() -> Looks:
    return collate([look(scene) for scene in SCENES])


def test_labels_match_the_things(looks: Looks) -> None:
    for number, names in enumerate(looks.names.view(2, GRID, GRID)):
        for thing in SCENES[number].things:
            x, y = ((thing.box[i] + thing.box[i + 2]) / 2 / SIDE * GRID for i in (0, 1))
            assert NAMES[names[int(y), int(x)] - 1] == thing.name
            assert looks.centres[number].view(GRID, GRID)[int(y), int(x)] == 1
    assert looks.centres.sum() <= sum(len(scene.things) for scene in SCENES)


def test_letters_are_in_reading_order() -> None:
    seen = 0
    for seed in range(40):
        scene = make_scene(seed, held_out=False)
        letters = look(scene).letters.view(GRID, GRID, 26)
        for thing in scene.things:
            if thing.kind == "word":
                seen += 1
                row = letters[(thing.box[1] + thing.box[3]) // 2 // PATCH]
                ends = thing.box[0] // PATCH, (thing.box[2] - 1) // PATCH
                found = row[ends[0] : ends[1] + 1].argmax(-1)[row[ends[0] : ends[1] + 1].any(-1)]
                assert {ascii_lowercase[index] for index in found} <= set(thing.name)
                assert row[:, ascii_lowercase.index(thing.name[0])][ends[0] : ends[0] + 3].any()
                assert row[:, ascii_lowercase.index(thing.name[-1])][ends[1] - 2 : ends[1] + 1].any()
    assert seen > 20


def test_window_is_a_slice_of_the_grid() -> None:
    window = next(iter(Windows(3, 12)))
    assert window.pixels.shape == (3, SIDE // 2, SIDE // 2)
    rows = window.patches.view(12, 12)
    assert (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert (rows[1:] - rows[:-1] == GRID).all()


def test_the_tower_is_what_a_server_runs(learner: Learner, model: Any, looks: Looks) -> None:
    """Without heads and windows it is transformers' own."""
    pixels = (looks.pixels / 255 - learner.mean) / learner.std
    with torch.inference_mode():
        features, _ = learner.tower(looks.pixels, looks.patches)
        reference = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, reference, atol=1e-4, rtol=1e-4)


def test_a_question_sees_the_image_and_itself(
    learner: Learner, model: Any, looks: Looks, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its answer is that of a prompt of its own, and does not depend on the other questions."""
    asked: Asked = collate([ask(tokenizer, SCENES[0], np.random.default_rng(0))])
    third = asked.question[0] == 3
    length = int((asked.targets[0][third] == IGNORED).sum())  # one less before the answer, one after it
    prompt = asked.tokens[0][third][:length]
    with torch.inference_mode():
        features, _ = learner.tower(looks.pixels[:1], looks.patches[:1])
        image = learner.llava.model.multi_modal_projector(features)
        states, _, _ = learner._language(image, looks.patches[:1], asked, jitter=False)
        together = learner.llava.lm_head(states[0])[third][length - 1]
        embed = learner.llava.model.language_model.embed_tokens
        alone = torch.cat((embed(learner.prefix)[None], image, embed(prompt)[None]), 1)
        hidden = model.language_model(inputs_embeds=alone).last_hidden_state[0, -1]
        expected = learner.llava.lm_head(hidden)
    torch.testing.assert_close(together, expected, atol=1e-3, rtol=1e-3)
    assert tokenizer.decode(prompt).endswith("ASSISTANT:")
