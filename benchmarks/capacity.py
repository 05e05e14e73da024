"""How many requests fit into the KV cache, unpruned and pruned:  python benchmarks/capacity.py

vLLM's engine in this process, a small model with random weights, and a KV cache of few blocks. Requests are added until
the engine would preempt one. Its own count is compared with arithmetic: a request of P prompt tokens that generates G
holds ceil((P + G - 1) / block size) blocks in the end, and vLLM keeps one block of the cache for itself. Exits with an
error if they differ. Writes ``capacity.json``.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_PLUGINS": "eadaprune", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import typer
from common import RESULTS, Output, save, scene, show
from geometry import IMAGE_TOKENS
from vllm import LLM, SamplingParams

from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.tools.evaluate import exactly

PROMPT = "<s>USER: <image>\nWhat is it? ASSISTANT:"
GENERATED, BLOCK_SIZE, BLOCKS = 48, 32, 161
SHARES = (1.0, 0.5, 0.22, 0.11)


def run(llm: LLM, requests: int, tokens: int) -> dict[str, Any]:
    """Generate for that many requests at once, each with a new image that keeps ``tokens``."""
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    options = {"energy": 1.0} if tokens == IMAGE_TOKENS else exactly(tokens)
    prompts = [
        {"prompt": PROMPT, "multi_modal_data": {"image": scene(seed)}, "mm_processor_kwargs": {"eadaprune": options}}
        for seed in range(requests)
    ]
    rendered = engine.renderer.render_cmpl(prompts)
    for number, prompt in enumerate(rendered):
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=GENERATED, ignore_eos=True))
    together = preempted = 0
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    least = before = free()
    while engine.has_unfinished_requests():
        engine.step()
        together = max(together, len(scheduler.running))
        preempted = max([preempted, *(request.num_preemptions for request in scheduler.requests.values())])
        least = min(least, free())
    llm.reset_prefix_cache()
    length = len(rendered[0]["prompt_token_ids"])
    return {"together": together, "preempted": preempted, "blocks": before - least, "prompt_tokens": length}


def main(output: Output = RESULTS) -> None:
    settings: dict[str, Any] = {"enforce_eager": True, "dtype": "bfloat16", "block_size": BLOCK_SIZE}
    settings |= {"max_model_len": 2048, "max_num_batched_tokens": 16384, "num_gpu_blocks_override": BLOCKS}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        llm = LLM(f"{name}/model", disable_log_stats=True, **settings)
    rows = []
    for share in SHARES:
        tokens = round(share * IMAGE_TOKENS)
        prompt = run(llm, 1, tokens)["prompt_tokens"]
        each = -(-(prompt + GENERATED - 1) // BLOCK_SIZE)
        fit = (BLOCKS - 1) // each
        full, over = run(llm, fit, tokens), run(llm, fit + 1, tokens)
        row = {"kept": tokens, "prompt_tokens": prompt, "blocks_each": each, "fit": fit, "full": full, "over": over}
        rows.append(row)
        exact = full["together"] == fit and not full["preempted"] and full["blocks"] == fit * each
        if not exact or (over["together"] > fit and not over["preempted"]):
            sys.exit(f"the engine's count differs from the arithmetic: {row}")
    title = f"Requests in a KV cache of {BLOCKS - 1} blocks of {BLOCK_SIZE} tokens, counted and computed"
    headings = ["kept tokens", "prompt", "blocks each", "requests that fit", "times unpruned"]
    keys = ("kept", "prompt_tokens", "blocks_each", "fit")
    show(title, headings, [[*(row[key] for key in keys), row["fit"] / rows[0]["fit"]] for row in rows])
    save(output / "capacity.json", settings, found=rows)


if __name__ == "__main__":
    typer.run(main)
