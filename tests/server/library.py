"""What ``test_library`` runs in processes of their own: vLLM as a library, where something changes or fails in the
middle. Prints one JSON object."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from harness import DTYPE
from instances import NIXL
from offline import prompt
from shared import photo
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.multimodal.media import MediaConnector
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

SETTINGS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "dtype": DTYPE, "block_size": 32}
SETTINGS["mm_processor_kwargs"] = {"eadaprune": {"energy": 0.9, "min_tokens": 16}}
SAMPLING = SamplingParams(max_tokens=4, temperature=0, logprobs=5)
FACTOR = 1.5


def is_scaled(name: str) -> bool:
    """The tower's norms: vLLM for CPU keeps copies of what is multiplied by matrices."""
    return "vision_tower" in name and "norm" in name


def scale(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if is_scaled(name):
                weight.mul_(FACTOR)


class Scaling:
    """A worker extension of an operator."""

    def scale_tower(self) -> None:
        scale(self.model_runner.get_model())  # type: ignore[attr-defined]


def answer(llm: LLM) -> dict[str, Any]:
    """To the same question each time, so that whatever has the image in a cache uses it."""
    (found,) = llm.generate([prompt(photo("astronaut"))], SAMPLING, use_tqdm=False)
    first = (found.outputs[0].logprobs or [{}])[0]
    return {
        "tokens": len(found.prompt_token_ids or []),
        "cached": found.num_cached_tokens,
        "first": {str(token): top.logprob for token, top in sorted(first.items())},
    }


def weights(model: str, others: str) -> dict[str, Any]:
    """What is answered before and after weights change in several ways, each time from those of ``model`` on."""
    llm = LLM(model, worker_extension_cls="library.Scaling", **SETTINGS)

    def reload(folder: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    found = {"before": [answer(llm), answer(llm)]}
    ways: dict[str, Callable[[], object]] = {
        "reloaded": lambda: reload(others),
        "function": lambda: llm.apply_model(scale),
        "extension": lambda: llm.collective_rpc("scale_tower"),
    }
    for way, change in ways.items():
        change()
        found[way] = [answer(llm), answer(llm)]
        reload(model)
        found[f"before {way}"] = [answer(llm)]
    llm.collective_rpc("check_health")
    found["kept"] = [answer(llm)]
    return found


def killed(model: str) -> dict[str, Any]:
    """What is raised where the engine's process dies while it is asked about an image."""
    llm = LLM(model, **SETTINGS)
    client: Any = llm.llm_engine.engine_core
    (process,) = client.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot answer before

    def kill() -> None:
        while not client.utility_results:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    try:
        answer(llm)
    except EngineDeadError as error:
        return {"error": type(error).__name__}
    return {"error": None}


async def asynchronous(model: str) -> dict[str, Any]:
    """``AsyncLLM`` with raw prompts, rendered ones, and streams of them."""
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **SETTINGS))
    image = prompt(photo("astronaut"))
    (rendered,) = await llm.renderer.render_cmpl_async([image])

    async def stream(*prompts: Any) -> AsyncIterator[StreamingInput]:
        for each in prompts:
            yield StreamingInput(each)

    async def count(request: str, given: Any) -> int:
        tokens = 0
        async for output in llm.generate(given, SamplingParams(max_tokens=1), request):
            tokens = len(output.prompt_token_ids or [])
        return tokens

    found: dict[str, Any] = {"raw": await asyncio.gather(*(count(f"raw-{number}", image) for number in range(3)))}
    found["rendered"] = await count("rendered", rendered)
    found["stream"] = await count("stream", stream(rendered))
    try:
        await count("raw stream", stream(prompt(photo("coffee"))))  # which no cache has
    except Exception as error:
        found["error"] = f"{error} {error.__cause__}"
    found["after"] = await count("after", image)
    llm.shutdown()
    return found


async def decode(model: str, request: str) -> tuple[str, int, list[float]]:
    """What is answered to a chat request that another instance prefilled: a raw prompt, with the parameters of the
    transfer in ``extra_args``."""
    body = json.loads(Path(request).read_text())
    image = MediaConnector().fetch_image(body["messages"][0]["content"][0]["image_url"]["url"])
    extra = {"kv_transfer_params": body["kv_transfer_params"]}
    sampling = SamplingParams(
        max_tokens=body["max_tokens"], temperature=0, ignore_eos=True, logprobs=0, extra_args=extra
    )
    settings = SETTINGS | {"dtype": "float32", "kv_transfer_config": NIXL, "limit_mm_per_prompt": {"image": 2}}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **settings))
    async for output in llm.generate(prompt(image), sampling, "decode"):
        (choice,) = output.outputs
    llm.shutdown()
    logprobs = [round(top[token].logprob, 3) for token, top in zip(choice.token_ids, choice.logprobs, strict=True)]
    return choice.text, len(output.prompt_token_ids), logprobs


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    if what == "asynchronous":
        result: Any = asyncio.run(asynchronous(*paths))
    elif what == "decode":
        result = asyncio.run(decode(*paths))
    elif what == "fresh":
        result = {"fresh": answer(LLM(*paths, **SETTINGS))}
    elif what == "weights":
        result = weights(*paths)
    else:
        result = killed(*paths)
    print("RESULT", json.dumps(result))
