"""Real servers, and a client that speaks to them through the OpenAI SDK."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI
from openai.types.chat import ChatCompletion
from PIL import Image

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.server import VLLM
from eadaprune_vllm.demo.server import Server as PlainServer

__all__ = [
    "BLOCK_SIZE",
    "DTYPE",
    "KV_BYTES",
    "MAX_DECODED",
    "VLLM",
    "PlainServer",
    "Server",
    "content",
    "environment",
    "eventually",
]

# On every machine: half the digits round otherwise in other company, and decisions are compared to the token.
DTYPE = "float32"
FRESH = {"connection": "close"}  # a new connection per request, so that several API servers share them
MAX_DECODED = 20_000_000  # bytes of pictures that the main server takes in one request, at four a pixel
BLOCK_SIZE = 32  # the smallest that attention on a CPU takes
# Of a token of the small model: key and value x layers x KV heads x head size x bytes.
KV_BYTES = 2 * 2 * 2 * 32 * getattr(torch, DTYPE).itemsize


# Without it vLLM for CPU always gives the worker a process.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Flags for a process of the worker's own, as where there are several ranks.
OWN_PROCESS = ["--distributed-executor-backend", "mp"]


def environment(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "EADAPRUNE_"))}
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    ours["OMP_NUM_THREADS"] = "1"  # models are small, and threads of several processes would wait for one another
    if worker := inherited.get("PYTEST_XDIST_WORKER"):  # or else vLLM binds the workers of all servers to the same core
        ours["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))
    return inherited | ours | extra


class Server(PlainServer):
    def __init__(self, log: Path, model: Path, *flags: str, **env: str) -> None:
        sizes = ["--max-model-len", "2048", "--block-size", str(BLOCK_SIZE)]
        sizes += ["--kv-cache-memory-bytes", "256M"]  # many servers run at a time
        # The worker is in the engine's process, as where there is one GPU, and not in one that has to start, too.
        sizes += ["--distributed-executor-backend", "uni"]
        env = environment(**ONE_PROCESS | env)
        del env["VLLM_CPU_KVCACHE_SPACE"]  # which would have precedence
        super().__init__(log, model, *sizes, *flags, env=env)
        self.client = OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, default_headers=FRESH
        )

    def ask(
        self, *parts: Image.Image | str, options: object = None, max_tokens: int = 4, **extra: Any
    ) -> ChatCompletion:
        """One chat turn; ``options`` go to the field ``eadaprune``, ``extra`` into the body."""
        kwargs = {} if options is None else {"eadaprune": options}
        return self.client.chat.completions.create(
            model=self.NAME,
            messages=[{"role": "user", "content": content(*parts)}],
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True} | kwargs | extra,
        )

    def prompt_tokens(self, *parts: Image.Image | str, **settings: Any) -> int:
        usage = self.ask(*parts, max_tokens=1, **settings).usage
        assert usage is not None
        return usage.prompt_tokens

    def answer(self, *parts: Image.Image | str, **settings: Any) -> str | None:
        return self.ask(*parts, max_tokens=12, **settings).choices[0].message.content

    def text_tokens(self, *parts: str) -> int:
        """Tokens of a prompt with one image besides the image's own: what a request costs beyond its kept tokens."""
        return self.prompt_tokens(Image.new("RGB", (336, 336)), *parts, options={"energy": 1}) - 576

    def post(self, path: str, body: dict[str, Any] | str, **headers: str) -> httpx.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        headers = {"content-type": "application/json"} | headers
        return httpx.post(f"{self.url}{path}", content=text, headers=headers, timeout=120)

    def document(self) -> Any:
        """What OpenAPI says of it."""
        return httpx.get(f"{self.url}/openapi.json", timeout=120).json()

    def label(self, name: str, label: str) -> str:
        return next(sample.labels[label] for sample in self.samples() if sample.name == name)

    def wait_until_idle(self) -> None:
        """Until no request is left in the engine, nor any block of one."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        eventually(lambda: not any(map(self.metric, gauges)))


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.2)


def content(*parts: Image.Image | str) -> list[Any]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
