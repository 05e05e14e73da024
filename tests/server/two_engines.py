"""What ``test_instances`` runs in a process of its own: two engines of a program, one that prefills and one that
decodes. Prints one JSON object."""

import asyncio
import json
import os
import socket
import sys
from typing import Any

from offline import prompt
from shared import photo
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.engine.async_llm import AsyncLLM

SETTINGS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "dtype": "float32", "block_size": 32}
SETTINGS |= {
    "kv_cache_memory_bytes": 256_000_000,
    "mm_processor_kwargs": {"eadaprune": {"energy": 0.9, "min_tokens": 1}},
}


def engine(model: str) -> AsyncLLM:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free.getsockname()[1])
    transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu")
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model, kv_transfer_config=transfer, **SETTINGS))


async def both(model: str) -> dict[str, Any]:
    """The answer of both engines, and of the first one alone."""
    prefill, decode = engine(model), engine(model)
    numbers = iter(range(9))

    async def ask(llm: AsyncLLM, max_tokens: int, params: Any) -> Any:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, extra_args={"kv_transfer_params": params})
        async for output in llm.generate(prompt(photo("astronaut")), sampling, f"request-{next(numbers)}"):
            found = output
        return found

    def answer(output: Any) -> list[Any]:
        return [len(output.prompt_token_ids), list(output.outputs[0].token_ids)]

    found: dict[str, Any] = {"alone": answer(await ask(prefill, 8, {}))}
    params = (await ask(prefill, 1, {"do_remote_decode": True})).kv_transfer_params
    found["together"] = answer(await ask(decode, 8, params))
    params = (await ask(prefill, 1, {"do_remote_decode": True})).kv_transfer_params
    del params["eadaprune"]
    try:
        await ask(decode, 8, params)
    except Exception as error:
        found["refused"] = f"{error} {error.__cause__}"
    prefill.shutdown()
    decode.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(both(sys.argv[1]))))
