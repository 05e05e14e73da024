"""Stock vLLM and the plugin side by side, and requests to them."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import exactly

# Of models with random weights. A flag of the caller that comes later wins: not every CPU has bfloat16 instructions.
FLAGS = ["--load-format", "dummy", "--max-model-len", "4096", "--limit-mm-per-prompt", '{"image": 4}']
FLAGS += ["--dtype", "float32"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM's engine would leave one core to its front end, which makes little use of it.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
}
STAGES = ("encode", "spectrum", "select")


@dataclass(frozen=True)
class Contender:
    """A server, and the pruning options that its requests carry."""

    name: str
    server: Server
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """When an answer came, and how its image was pruned.

    Attributes:
        first_token: seconds from sending the request to the first token.
        seconds: to the end of the answer.
        energy: threshold in force for the image; 0 on stock vLLM.
    """

    first_token: float
    seconds: float
    energy: float


@contextmanager
def stock_and_plugin(
    folder: Path, model: Path, flags: Sequence[str], env: dict[str, str] = ENVIRONMENT
) -> Iterator[tuple[Server, Server]]:
    """Start both servers. They may read images in ``folder``; the one that has no turn is idle."""
    own = dict(os.environ) | env
    flags = ["--allowed-local-media-path", str(folder), *flags]
    with (
        Server(folder / "stock.log", model, *flags, env=own) as stock,
        Server(folder / "plugin.log", model, *flags, "--plugin", "eadaprune", env=own) as plugin,
    ):
        yield stock, plugin


def contenders(stock: Server, plugin: Server, kept: Mapping[str, int]) -> list[Contender]:
    """Stock vLLM; the plugin with all tokens (``energy`` 1.0: no decision); and with fixed numbers of tokens.

    They are fixed because features of random weights have no spectrum worth a threshold. It is computed all the same.
    """
    fixed = [Contender(name, plugin, exactly(count)) for name, count in kept.items()]
    return [Contender("stock", stock), Contender("energy 1", plugin, {"energy": 1.0}), *fixed]


def in_turns(
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Contender], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """Measure every contender once in each round; one more round before them does not count, as it warms up."""
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    for turn in range(rounds + 1):
        for each in contenders:
            measured = measure(each)
            if turn:
                found[each.name].append(measured)
    return found


def stages(server: Server) -> dict[str, float]:
    """Seconds that the engine spent in each stage so far, and for how many images (``pruned``); 0 on stock vLLM."""
    found = {stage: server.metric("eadaprune_stage_seconds_sum", stage=stage) for stage in STAGES}
    return found | {"pruned": server.metric("eadaprune_stage_seconds_count", stage="total")}


def ask(server: Server, image: str, options: dict[str, Any] | None = None, max_tokens: int = 1) -> Answer:
    """Ask about one image, by URL, and read the answer as it is streamed."""
    content: Any = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    body = {"ignore_eos": True} | ({"eadaprune": options} if options else {})
    first = energy = 0.0
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        start = time.perf_counter()
        for chunk in client.chat.completions.create(
            model=server.NAME,
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            stream=True,
            extra_body=body,
        ):
            if report := (chunk.model_extra or {}).get("eadaprune"):
                energy = report["images"][0]["energy_threshold"]
            if not first and chunk.choices:
                first = time.perf_counter() - start
        return Answer(first, time.perf_counter() - start, energy)
