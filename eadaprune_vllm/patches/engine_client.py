"""vLLM's clients of engines: the front end is connected, and learns what engines say of the reference pictures."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.engine_client import lock
from eadaprune_vllm.patching import wrap
from eadaprune_vllm.startup import configuration

_READY_CURVES = "_eadaprune_ready_curves"


def install() -> None:
    for path in ("SyncMPClient._send_input", "InprocClient.get_output"):
        wrap(f"vllm.v1.engine.core_client:{path}")(_alone)

    for path in ("async_llm:AsyncLLM", "llm_engine:LLMEngine"):

        @wrap(f"vllm.v1.engine.{path}.__init__")
        def init(original: Any, llm: Any, *args: Any, **kwargs: Any) -> None:
            original(llm, *args, **kwargs)
            processor = llm.renderer.mm_processor
            processor.front_end.connect(llm.engine_core, processor.server_options)

    @wrap("vllm.v1.engine.core_client:MPClient._apply_ready_response")
    def apply_ready_response(original: Any, client: Any, payload: bytes) -> None:
        original(client, payload)
        take_curves(client, msgspec.msgpack.decode(payload))


def _alone(original: Any, client: Any, *args: Any, **kwargs: Any) -> Any:
    """LLM.embed and its like render, and ask, on a thread of their own while another one steps the engine. What is not
    made for two threads, a socket or an engine in this process, is of one at a time."""
    with lock(client):
        return original(client, *args, **kwargs)


def take_curves(client: Any, response: Mapping[str, Any]) -> None:
    """Take in what an engine says of the reference pictures.

    Args:
        client: of all engines.
        response: the last that the engine says at start.

    Raises:
        StartupError: if it says nothing of them.
    """
    rank = response["data_parallel_rank"]
    if KEY not in response:
        raise StartupError(
            f"engine {rank} runs without the plugin; every node of a server, headless ones too, needs "
            "--plugin eadaprune and the same --eadaprune-* flags"
        )
    ready_curves = vars(client).setdefault(_READY_CURVES, {})
    ready_curves[rank] = response[KEY]
    # Engines may differ by rounding; all front ends have the same from the first.
    curves = [Curve(name, np.frombuffer(data)) for name, data in ready_curves[min(ready_curves)]]
    configuration.set_curves(client.vllm_config, curves)
