"""vLLM's configuration is checked and completed, and every process with a renderer gets a front end."""

from typing import Any

from eadaprune_vllm import architectures
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.patches.renderer import decide_between
from eadaprune_vllm.patching import wrap
from eadaprune_vllm.startup import checks, configuration
from eadaprune_vllm.startup.front_end import create_front_end


def install() -> None:
    @wrap("vllm.engine.arg_utils:EngineArgs.create_engine_config")
    def create_engine_config(
        original: Any, engine_args: Any, usage_context: Any = None, headless: bool = False, **kwargs: Any
    ) -> Any:
        from vllm.usage.usage_lib import UsageContext

        # vLLM would pass our key to the image processor, so it becomes an attribute of the configuration instead.
        given = engine_args.mm_processor_kwargs
        ours = (given or {}).get(KEY)
        if isinstance(ours, dict) and ours.get("any_model"):
            architectures.register_any()
        engine_args.mm_processor_kwargs = {k: v for k, v in (given or {}).items() if k != KEY} or None
        try:
            vllm_config = original(engine_args, usage_context, headless, **kwargs)
        finally:
            engine_args.mm_processor_kwargs = given
        checks.check(vllm_config)
        energy = architectures.adapter(vllm_config.model_config.architecture).eadaprune_energy
        options = configuration.operator_options(ours, energy)
        if options.load_aware:
            serving = usage_context is UsageContext.OPENAI_API_SERVER
            configuration.check_load_aware(serving=serving, engine_args=engine_args)
        configuration.configure(vllm_config, options)
        return vllm_config

    @wrap("vllm.renderers.registry:RendererRegistry.load_renderer")
    def load_renderer(original: Any, registry: Any, renderer_mode: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = create_front_end(config)
        renderer = original(registry, renderer_mode, config, *args, **kwargs)
        renderer.mm_processor.front_end = front_end
        decide_between(renderer)
        return renderer
