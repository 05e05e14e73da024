"""The engine core: it measures the reference pictures, sends their spectra to front ends, and decides between steps."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.core import call_workers, decide, run_idle, run_next
from eadaprune_vllm.engine.reference import measure_curves
from eadaprune_vllm.messages import UTILITY
from eadaprune_vllm.patching import wrap
from eadaprune_vllm.startup import configuration

_CORE = "vllm.v1.engine.core"


def install() -> None:
    from vllm.v1.engine import EngineCoreReadyResponse
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, UTILITY, decide)

    @dataclass
    class Ready(EngineCoreReadyResponse):
        """The ready message of an engine to each front end. vLLM ignores fields that it does not know."""

        eadaprune: list[tuple[str, bytes]] = field(default_factory=list)

    # After this step workers can encode. The engine's process loads plugins too late to wrap ``__init__``.
    @wrap(f"{_CORE}:EngineCore._initialize_kv_caches")
    def initialize_kv_caches(original: Any, core: Any, vllm_config: Any) -> Any:
        initialized = original(core, vllm_config)
        curves = measure_curves(vllm_config, partial(call_workers, core))
        configuration.log_defaults(configuration.set_curves(vllm_config, curves))
        return initialized

    @wrap(f"{_CORE}:EngineCoreProc._make_ready_response")
    def make_ready_response(original: Any, core: Any) -> Any:
        targets = ServerOptions.of(core.vllm_config.model_config.multimodal_config).targets
        assert targets, "set_curves was called before"
        curves = [(curve.name, curve.thresholds.tobytes()) for curve in targets.curves]
        return Ready(**vars(original(core)), eadaprune=curves)

    # Messages that came during the last step have been handled by now.
    @wrap(f"{_CORE}:EngineCoreProc._process_engine_step")
    def process_engine_step(original: Any, core: Any) -> bool:
        run_next(core)
        model_executed: bool = original(core)
        return model_executed

    @wrap(f"{_CORE}:EngineCoreProc._notify_idle_state_callbacks")
    def notify_idle_state_callbacks(original: Any, core: Any) -> None:
        original(core)
        run_idle(core)
