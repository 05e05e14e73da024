"""vLLM's engine clients: the front end is connected to them, and gets the spectra of the reference pictures."""

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

_CURVES = "_eadaprune_curves"


def install() -> None:
    for path in ("SyncMPClient._send_input", "InprocClient.get_output"):
        wrap(f"vllm.v1.engine.core_client:{path}")(_locked)

    for path in ("async_llm:AsyncLLM", "llm_engine:LLMEngine"):

        @wrap(f"vllm.v1.engine.{path}.__init__")
        def init(original: Any, llm: Any, *args: Any, **kwargs: Any) -> None:
            original(llm, *args, **kwargs)
            processor = llm.renderer.mm_processor
            processor.front_end.connect(llm.engine_core, processor.server_options)

    @wrap("vllm.v1.engine.core_client:MPClient._apply_ready_response")
    def apply_ready_response(original: Any, client: Any, payload: bytes) -> None:
        original(client, payload)
        receive_curves(client, msgspec.msgpack.decode(payload))


def _locked(original: Any, client: Any, *args: Any, **kwargs: Any) -> Any:
    """LLM.embed and similar methods render, and send decision requests, on one thread while another steps the engine.
    The socket, or the engine in this process, is not thread-safe."""
    with lock(client):
        return original(client, *args, **kwargs)


def receive_curves(client: Any, response: Mapping[str, Any]) -> None:
    """Take the spectra of the reference pictures from an engine's ready message.

    Args:
        client: vLLM's, of all engines.
        response: the ready message.

    Raises:
        StartupError: if it has no spectra.
    """
    rank = response["data_parallel_rank"]
    if KEY not in response:
        raise StartupError(
            f"engine {rank} runs without the plugin; every node of a server, headless ones too, needs "
            "--plugin eadaprune and the same --eadaprune-* flags"
        )
    by_rank = vars(client).setdefault(_CURVES, {})
    by_rank[rank] = response[KEY]
    # The curves of engines may differ by rounding; all front ends use those of the lowest rank.
    curves = [Curve(name, np.frombuffer(data)) for name, data in by_rank[min(by_rank)]]
    configuration.set_curves(client.vllm_config, curves)
