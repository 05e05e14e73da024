"""How many requests fit into the KV cache, unpruned and pruned:  python benchmarks/capacity.py

vLLM's engine in this process, a small model with random weights, a KV cache of few blocks. Requests are added until
one more would be preempted, by the engine's own count, and compared with the arithmetic: a request of P prompt tokens
that generates G holds ceil((P + G - 1) / block size) blocks in the end, and one block of the cache is vLLM's own.
Fails if they differ. Writes ``capacity.json``.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

os.environ |= {"VLLM_PLUGINS": "eadaprune", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import typer
from common import RESULTS, about, scene
from rich.console import Console
from rich.table import Table
from vllm import LLM, SamplingParams

from eadaprune_vllm.demo.model import make_model

PROMPT = "<s>USER: <image>\nWhat is it? ASSISTANT:"
TOKENS, GENERATED, BLOCK_SIZE, BLOCKS = 576, 48, 32, 161
SHARES = (1.0, 0.5, 0.22, 0.11)


def run(llm: LLM, requests: int, tokens: int) -> dict[str, Any]:
    """Generate for that many requests at once, each with an image of its own that keeps ``tokens``."""
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    options = {"energy": 1.0} if tokens == TOKENS else {"energy": 0.5, "min_tokens": tokens, "max_tokens": tokens}
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


def main(output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS) -> None:
    settings: dict[str, Any] = {"enforce_eager": True, "dtype": "bfloat16", "block_size": BLOCK_SIZE}
    settings |= {"max_model_len": 2048, "max_num_batched_tokens": 16384, "num_gpu_blocks_override": BLOCKS}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        llm = LLM(f"{name}/model", disable_log_stats=True, **settings)
    rows = []
    for share in SHARES:
        tokens = round(share * TOKENS)
        prompt = run(llm, 1, tokens)["prompt_tokens"]
        each = -(-(prompt + GENERATED - 1) // BLOCK_SIZE)
        fit = (BLOCKS - 1) // each
        full, over = run(llm, fit, tokens), run(llm, fit + 1, tokens)
        row = {"kept": tokens, "prompt_tokens": prompt, "blocks_each": each, "fit": fit, "full": full, "over": over}
        rows.append(row)
        exact = full["together"] == fit and not full["preempted"] and full["blocks"] == fit * each
        if not exact or (over["together"] > fit and not over["preempted"]):
            sys.exit(f"the engine's count differs from the arithmetic: {row}")
    table = Table(
        title=f"Requests in a KV cache of {BLOCKS - 1} blocks of {BLOCK_SIZE} tokens, as counted and as computed"
    )
    for heading in ("kept tokens", "prompt", "blocks each", "requests that fit", "more than unpruned"):
        table.add_column(heading, justify="right")
    for row in rows:
        more = row["fit"] / rows[0]["fit"]
        table.add_row(*(str(row[name]) for name in ("kept", "prompt_tokens", "blocks_each", "fit")), f"{more:.1f} x")
    Console().print(table)
    output.mkdir(exist_ok=True)
    (output / "capacity.json").write_text(json.dumps({"about": about(), "found": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
