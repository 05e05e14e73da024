"""Every supported architecture on real vLLM: at energy 1.0 the answers are stock vLLM's, below it the counts are those
of the reference, and nothing else changes them. Small models with random weights."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import ALL_FULL, FAMILIES, HYBRID, LATENT, NOT_TOGETHER, ONE_VIDEO, WITHOUT_IMAGE, WITHOUT_VIDEO, quantize
from harness import environment
from inprocess import CHATS, CLIPS, SCENES, TEXT, VIDEO_CHATS
from PIL import Image
from processors import processor
from reference import Reference, checked, transformers_model

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import PruneDecision

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all models
SCRIPT = Path(__file__).with_name("inprocess.py")
NULL = {"energy": 1.0}
SOME = {"energy": 0.9, "min_tokens": 4}
FIXED = {"min_tokens": 11, "max_tokens": 11}
VARIOUS: list[dict[str, Any]] = [
    NULL,
    SOME,
    {"energy": 0.97, "min_tokens": 4, "selector": "attention"},
    {"energy": 0.9, "min_tokens": 4, "scope": "image"},
    FIXED,
]
UNSAID = {"min_tokens": 4}  # the threshold, which is 1.0 where pages are read
EXACT = [name for name in FAMILIES if name not in HYBRID]
OF_PAGES = ("glm_ocr", "paddleocr_vl")  # which keep everything by default
# On other CPUs stock vLLM, too, starts and then fails at the first product of 4-bit weights.
FOUR_BIT = torch.cpu._is_avx512_supported()


def chats(name: str) -> list[str]:
    if name in WITHOUT_IMAGE:
        return ["clip"]
    videos = () if name in WITHOUT_VIDEO else VIDEO_CHATS
    without = ["both"] * (name in ONE_VIDEO) + ["between"] * (name in NOT_TOGETHER)
    return [*CHATS, *(chat for chat in videos if chat not in without)]


def words(name: str) -> list[str]:
    """Images that different options are tried on, or else a video."""
    return ["clip"] if name in WITHOUT_IMAGE else [*SCENES]


def cases(name: str) -> list[tuple[str, dict[str, Any]]]:
    """These with options."""
    various = [*VARIOUS, UNSAID] if name in OF_PAGES else VARIOUS
    return [(word, options) for word in words(name) for options in various]


def run(work: dict[str, list[Any]], **env: str) -> dict[str, Any]:
    """Answers to the batches of each model, or why it did not run."""
    own = [str(SCRIPT.parent), str(SCRIPT.parent.parent)]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *own])
    output = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(work),
        env=environment(PYTHONPATH=path, VLLM_ENABLE_V1_MULTIPROCESSING="0", **env),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    results = [line.removeprefix("RESULT ") for line in output.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, output.stdout[-3000:] + output.stderr[-3000:]
    found: dict[str, Any] = json.loads(results[0])
    return found


def frames(word: str) -> Any:
    """The frames of a clip."""
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in CLIPS[word]])


class Family:
    """One model: what stock vLLM answers, what vLLM answers with pruning, and what the counts should be."""

    def __init__(self, name: str, folder: Path, stock: Any, pruning: Any) -> None:
        self.chats, self.words, self.cases = chats(name), words(name), cases(name)
        (answers,), batches = stock, pruning
        self.stock = dict(zip(self.chats, answers, strict=True))
        self.null, self.some, self.again = (dict(zip(self.chats, batch, strict=True)) for batch in batches[:3])
        self.various = batches[3]
        self.reference = Reference(folder, torch.float32)
        self.processor = processor(folder)
        self.transformers = transformers_model(folder, torch.float32)
        # vLLM's experts on a CPU are not as exact as the rest of it, stock or pruned; Gemma's logits are large numbers.
        self.noise = 3e-3 if "moe" in name else 1e-4 if name.startswith("gemma") else 1e-5
        # With such logits its likeliest tokens stay what they are.
        self.redacted = "first" if name.startswith("gemma") else "tokens"
        self.has_prefix_cache = name not in (*LATENT, *ALL_FULL)

    @cache  # noqa: B019
    def kept(self, word: str, options: str) -> PruneDecision:
        """The reference's decision about a scene or a clip."""
        if word in SCENES:
            return self.reference.kept(SCENES[word], **json.loads(options))
        inputs = self.processor.video_processor(frames(word), do_sample_frames=False, return_tensors="pt")
        return checked(self.reference.encode(inputs), PruneOptions(**json.loads(options)))

    def inputs(self, word: str) -> dict[str, Any]:
        """What transformers makes of a chat with one image or video."""
        content = [{"type": "image" if word in SCENES else "video"}, {"type": "text", "text": TEXT}]
        chat = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        item = {"images": [SCENES[word]]} if word in SCENES else {"videos": [frames(word)]}
        inputs = dict(self.processor(text=chat, **item, return_tensors="pt"))
        inputs.pop("token_type_ids", None)  # by which images attend to what follows, which vLLM does not do on a CPU
        return inputs

    def prompt(self, chat: str, options: dict[str, Any]) -> int:
        """How many tokens the prompt of a chat should have."""
        items = [word for word in (CHATS | VIDEO_CHATS)[chat] if word in SCENES or word in CLIPS]
        decisions = [self.kept(word, json.dumps(options)) for word in items]
        pruned = sum(kept.unpruned - len(kept.placeholders) for kept in decisions)
        return int(self.stock[chat]["prompt"]) - pruned


@pytest.fixture(scope="module")
def folders(family: Callable[[str], Path]) -> dict[str, Path]:
    found = {name: family(name) for name in FAMILIES}
    return found | {"awq": quantize(found["qwen2_5_vl"], found["qwen2_5_vl"].with_name("awq"))}


@pytest.fixture(scope="module")
def answered(folders: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stock vLLM, and vLLM with pruning, say about each model."""
    stock: dict[str, Any] = {name: [[(chat, None) for chat in chats(name)]] for name in FAMILIES}
    pruning: dict[str, Any] = {
        name: [
            [(chat, NULL) for chat in chats(name)],
            [(chat, SOME) for chat in chats(name)],
            [(chat, SOME) for chat in chats(name)],
            cases(name),
        ]
        for name in EXACT
    }
    for name in HYBRID:
        pruning[name] = [[(chat, options) for chat in chats(name)] for options in (NULL, FIXED, FIXED)]
    if FOUR_BIT:
        stock["awq"], pruning["awq"] = [[("square", None)]], [[("square", NULL), ("square", SOME)]]

    def by_name(work: dict[str, Any], **env: str) -> dict[str, Any]:
        found = run({str(folders[name]): batches for name, batches in work.items()}, **env)
        return {name: found[str(folders[name])] for name in work}

    with ThreadPoolExecutor() as pool:
        first = pool.submit(by_name, stock)
        second = pool.submit(by_name, pruning, VLLM_PLUGINS="eadaprune")
    return first.result(), second.result()


@pytest.fixture(scope="module")
def families(folders: dict[str, Path], answered: tuple[dict[str, Any], dict[str, Any]]) -> Callable[[str], Family]:
    def of(name: str) -> Family:
        stock, pruning = (of_each[name] for of_each in answered)
        for each in (stock, pruning):
            assert not isinstance(each, str), each  # why it did not run
        return Family(name, folders[name], stock, pruning)

    return cache(of)


@pytest.fixture(params=EXACT)
def found(request: pytest.FixtureRequest, families: Callable[[str], Family]) -> Family:
    return families(request.param)


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest difference of the first token's log-probabilities, over the tokens that both lists hold."""
    shared = first["first"].keys() & second["first"].keys()
    assert len(shared) >= 19
    return max(abs(float(first["first"][token]) - float(second["first"][token])) for token in shared)


def test_at_energy_one_the_answers_are_stock_vllms(found: Family) -> None:
    for chat in found.chats:
        assert found.null[chat]["prompt"] == found.stock[chat]["prompt"]
        assert difference(found.null[chat], found.stock[chat]) < 1e-5
        assert found.null[chat]["tokens"] == found.stock[chat]["tokens"]


def test_pruning_changes_the_answers_so_that_parity_means_something(found: Family) -> None:
    redacted = found.redacted
    assert sum(found.some[chat][redacted] != found.stock[chat][redacted] for chat in found.chats) > len(found.chats) / 2


def test_prompts_shrink_by_what_the_reference_prunes(found: Family) -> None:
    """One image, several of different sizes, the same one twice, videos, and both between texts."""
    for chat in found.chats:
        assert found.some[chat]["prompt"] == found.prompt(chat, SOME) < found.stock[chat]["prompt"]


@pytest.mark.parametrize("scene", ["square", "wide", "tall", "large"])
def test_the_answer_is_that_of_transformers_attending_to_kept_tokens_only(found: Family, scene: str) -> None:
    """Rows, newlines, order and positions at once: a token that nothing attends to might as well not be there. With
    M-RoPE all tokens keep the positions they have unpruned; without, they are numbered anew."""
    word = scene if scene in found.words else found.words[0]
    kind, config = "image" if word in SCENES else "video", found.transformers.config
    for options, answer in ((NULL, found.null[word]), (SOME, found.some[word])):
        inputs = found.inputs(word)
        ids = inputs["input_ids"]
        names = "placeholder_ids", f"{kind}_token_id", f"{kind}_token_index"
        placeholders = next(filter(None, (getattr(config, name, None) for name in names)))
        image = torch.isin(ids[0], torch.tensor(placeholders)).nonzero()[:, 0]
        mask = torch.ones_like(ids)
        mask[0, image] = 0
        mask[0, image[found.kept(word, json.dumps(options)).placeholders]] = 1
        if hasattr(found.transformers.model, "get_rope_index"):
            sizes = {name: inputs[name] for name in ("image_grid_thw", "target_sizes") if name in inputs}
            positions, _ = found.transformers.model.get_rope_index(ids, inputs["mm_token_type_ids"], **sizes)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            output = found.transformers(**inputs | {"attention_mask": mask}, position_ids=positions)
        logprobs = output.logits[0, -1].log_softmax(-1)
        assert answer["prompt"] == mask.sum()
        assert max(abs(float(logprobs[int(token)]) - value) for token, value in answer["first"].items()) < found.noise


def test_a_second_time_the_prompts_are_found_in_the_caches(found: Family) -> None:
    for chat in found.chats:
        again, before = found.again[chat], found.some[chat]
        assert again["prompt"] == before["prompt"]
        assert again["cached"] >= (before["prompt"] // 32 * 32 - 32) * found.has_prefix_cache
        assert difference(again, before) < 1e-5
        assert again["tokens"] == before["tokens"]


def test_different_options_at_once(found: Family) -> None:
    for (word, options), answer in zip(found.cases, found.various, strict=True):
        assert answer["prompt"] == found.prompt(word, options)
        if options in (NULL, SOME):
            alone = (found.null if options == NULL else found.some)[word]
            assert difference(answer, alone) < 1e-5


def test_a_fixed_budget_is_met_over_all_tiles_or_frames(found: Family) -> None:
    for word in {"noise", "large", "clip"} & {*found.words}:
        assert len(found.kept(word, json.dumps(FIXED))) == 11


@pytest.mark.parametrize("name", HYBRID)
def test_language_models_with_linear_attention(answered: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    """In bfloat16, in which decisions are not those of a reference to the token."""
    (stock,), (null, fixed, again) = (of_each[name] for of_each in answered)
    for chat, one, other, pruned, same in zip(chats(name), stock, null, fixed, again, strict=True):
        items = [word for word in (CHATS | VIDEO_CHATS)[chat] if word in SCENES or word in CLIPS]
        assert other["prompt"] == one["prompt"] >= pruned["prompt"] == same["prompt"] > 11 * (len(items) - 1)
        assert difference(other, one) < 0.05
        assert difference(same, pruned) < 0.05
    assert sum(one["tokens"] != pruned["tokens"] for one, pruned in zip(stock, fixed, strict=True)) > len(stock) / 3


@pytest.mark.skipif(not FOUR_BIT, reason="vLLM has no product of 4-bit weights for a CPU without AVX-512")
def test_a_quantized_language_model_beside_a_tower_in_16_bit(answered: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ((stock,),), ((full, pruned),) = (of_each["awq"] for of_each in answered)
    assert full["prompt"] == stock["prompt"] > pruned["prompt"]
    assert difference(full, stock) < 0.15
