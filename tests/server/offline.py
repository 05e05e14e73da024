"""What ``test_offline`` runs in a process of its own: vLLM's offline ``LLM`` class. Prints one JSON object."""

import json
import math
import random
import sys
from typing import Any

from harness import DTYPE
from PIL import Image
from shared import noise, photo
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.core.prune import prune
from eadaprune_vllm.engine import decide

DEFAULTS = {"energy": 0.9, "min_tokens": 16}
PROMPT = "<s>USER: <image>\nWhat is it? ASSISTANT:"


def prompt(image: Any, **options: Any) -> dict[str, Any]:
    kwargs = {"mm_processor_kwargs": {"eadaprune": options}} if options else {}
    return {"prompt": PROMPT, "multi_modal_data": {"image": image}} | kwargs


def chat(image: Image.Image, **options: Any) -> list[Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "user", "content": [part | ({"eadaprune": options} if options else {})]}]


def counts(llm: LLM) -> dict[str, Any]:
    """Prompt tokens by default and at another threshold, of prompts and of chats, and a refused request."""
    image = photo("astronaut")
    requests = [prompt(image), prompt(image, energy=0.99), prompt(image, energy=1)]
    found: dict[str, Any] = {"tokens": [len(out.prompt_token_ids or []) for out in llm.generate(requests)]}
    (whole,) = llm.generate([prompt(image)], mm_processor_kwargs={"eadaprune": {"energy": 0.99}})
    found["whole"] = len(whole.prompt_token_ids or [])
    conversations = [chat(image), chat(image, energy=0.99)]
    found["chat"] = [len(out.prompt_token_ids or []) for out in llm.chat(conversations)]
    try:
        llm.generate(prompt(image, energy=2))
    except Exception as error:
        found["error"] = str(error)
    return found


def blocks(llm: LLM) -> dict[str, Any]:
    """Steps the engine by hand and compares its blocks in use with the request's tokens, exactly."""
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    size = scheduler.block_size
    differences = []
    for energy in (0.8, 0.95, 1.0):
        free = pool.get_num_free_blocks()
        (rendered,) = engine.renderer.render_cmpl([prompt(noise(3, blocks=20), energy=energy)])
        engine.add_request(str(energy), rendered, SamplingParams(max_tokens=40, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
            for request in scheduler.running:
                used = free - pool.get_num_free_blocks()
                differences.append(used - math.ceil(request.num_computed_tokens / size))
    return {"differences": differences, "free": pool.get_num_free_blocks() - free}


def whims(llm: LLM) -> dict[str, Any]:
    """One image, about which the engine decides otherwise each time it is asked: what it answers by the tokens of the
    prompt, and what it answers where so many are asked for."""
    image, draw, budgets = noise(5, blocks=20), random.Random(0), (20, 40, 60)
    engine: Any = llm.llm_engine
    found: list[tuple[int, list[int]]] = []

    def fixed(k: int) -> dict[str, Any]:
        return {"energy": 0.5, "min_tokens": k, "max_tokens": k}

    def ask(*requests: Any) -> list[tuple[int, list[int]]]:
        sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        outputs = llm.generate([*requests], sampling, use_tqdm=False)
        return [(len(out.prompt_token_ids or []), list(out.outputs[0].token_ids)) for out in outputs]

    def search(request: Any) -> tuple[int, list[int]]:
        (beams,) = llm.beam_search([request], BeamSearchParams(1, 6, ignore_eos=True))
        tokens = beams.sequences[0].tokens
        return len(tokens) - 6, tokens[-6:]

    def whim(encoding: Any, options: Any) -> Any:
        return prune(encoding, options.model_copy(update=fixed(draw.choice(budgets))))

    decide.prune = whim  # type: ignore[attr-defined]
    for number in range(30):
        engine.reset_mm_cache()
        first, second, _, last = ask(prompt(image), prompt(image), prompt(noise(number)), prompt(image))
        found += [first, second, last, search(prompt(image))]
    decide.prune = prune  # type: ignore[attr-defined]
    engine.reset_mm_cache()
    llm.reset_prefix_cache()
    return {"whims": found, "fixed": [*ask(*(prompt(image, **fixed(k)) for k in budgets))]}


def beams(llm: LLM) -> dict[str, Any]:
    """All tokens of beams, the best first: of a search with one beam, of one with several, and of a greedy answer."""
    asked = prompt(photo("coffee"), energy=0.9)
    one, several = (
        [beam.tokens for beam in llm.beam_search([asked], BeamSearchParams(width, 6, ignore_eos=True))[0].sequences]
        for width in (1, 3)
    )
    (greedy,) = llm.generate(asked, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    return {"beams": [one, several], "greedy": [*(greedy.prompt_token_ids or ()), *greedy.outputs[0].token_ids]}


def embeddings(llm: LLM) -> list[tuple[int, list[float]]]:
    """Of more images than fit in at once, each twice: vLLM renders them on a thread of its own, which asks the engine
    while another one steps it."""
    found = llm.embed([prompt(noise(number % 20), energy=0.9) for number in range(40)], use_tqdm=False)
    return [(len(out.prompt_token_ids), out.outputs.embedding) for out in found]


def scored(llm: LLM) -> list[int]:
    """Tokens of a query with a picture, by default and under options of its own."""
    documents = [{"content": chat(photo("astronaut"), **options)[0]["content"]} for options in ({}, {"energy": 0.99})]
    return [len(out.prompt_token_ids) for out in llm.score("What is it?", documents, use_tqdm=False)]


if __name__ == "__main__":
    what, model = sys.argv[1:]
    settings: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "dtype": DTYPE, "block_size": 32}
    options = DEFAULTS | ({"budget": "span"} if what == "by span" else {})
    if what in ("embed", "classify"):
        settings |= {"mm_processor_kwargs": {"eadaprune": options}, "runner": "pooling", "convert": what}
        llm = LLM(model, max_num_seqs=4, **settings)
        print("RESULT", json.dumps({"scored": scored(llm), "embeddings": embeddings(llm) if what == "embed" else None}))
        sys.exit()
    llm = LLM(model, mm_processor_kwargs={"eadaprune": options}, max_num_batched_tokens=128, **settings)
    result = counts(llm)
    if what == "blocks":
        result |= beams(llm) | blocks(llm) | whims(llm)
    print("RESULT", json.dumps(result))
