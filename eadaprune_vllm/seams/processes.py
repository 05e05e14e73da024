"""The processes and threads of a server, as vLLM's configuration and objects tell."""

import asyncio
from collections.abc import Callable
from typing import Any


def front_ends(vllm_config: Any) -> int:
    """How many front ends this server has, on this node."""
    return int(vllm_config.parallel_config._api_process_count)


async def on_render_thread(renderer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function`` where vLLM processes images: on its one thread."""
    return await asyncio.get_running_loop().run_in_executor(renderer._mm_executor, function, *args)
