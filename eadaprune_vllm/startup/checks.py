"""Whether a configuration of vLLM can be served with pruning."""

import sys
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
from vllm.multimodal.processing import BaseMultiModalProcessor

from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.generic import EmbedPerPlaceholder
from eadaprune_vllm.patching import check_overrides

# Return parameters of an instance's request, with which another loads its blocks: the decision travels in them.
_PULLING_CONNECTORS = {"NixlConnector", "NixlPullConnector"}
# KV connectors that find blocks by vLLM's block hashes or by the identifiers of images: both depend on the kept tokens.
_STORES = {
    "DecodeBenchConnector",  # stores nothing
    "ExampleConnector",
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
    "MooncakeStoreConnector",
    "MultiConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
}
_TRANSFER_CONNECTORS = {
    "MoRIIOConnector",
    "MooncakeConnector",
    "NixlPushConnector",
    "P2pNcclConnector",
}
_IGNORES_IMAGES = {"HF3FSKVConnector"}  # finds blocks by token ids alone

# Unsupported configurations: a predicate of the multimodal and of the whole configuration, and the reason.
_REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (
        lambda mm, c: envs.VLLM_USE_RUST_FRONTEND,
        "the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported: it runs no Python plugin",
    ),
    (
        lambda mm, c: c.model_config.is_encoder_decoder,
        "this model is an encoder-decoder, whose images are not part of the prompt",
    ),
    (
        lambda mm, c: issubclass(_adapter(c), EmbedPerPlaceholder) and c.model_config.uses_mrope,
        "this model has M-RoPE positions, which need an adapter of its own",
    ),
    (
        lambda mm, c: "__new__" in vars(_adapter(c).__bases__[-1]),
        "vLLM's class of this model creates an instance of another class, which the plugin cannot replace",
    ),
    (
        lambda mm, c: issubclass(_adapter(c), EmbedPerPlaceholder) and _has_own_prompt_updates(_adapter(c)),
        "vLLM's processor of this model has its own way of putting placeholders into prompts, which needs an adapter",
    ),
    (
        lambda mm, c: (
            c.model_config.architecture == "LlavaForConditionalGeneration"
            and c.model_config.hf_config.vision_config.model_type == "pixtral"
        ),
        "the vision tower of this model is of type 'pixtral', which the adapter of LLaVA does not support",
    ),
    (
        lambda mm, c: not any(mm.get_limit_per_prompt(modality) for modality in _adapter(c).eadaprune_modalities),
        "images and videos are switched off (--language-model-only or --limit-mm-per-prompt), so there is nothing to "
        "prune",
    ),
    (
        # vLLM switches it on for instances that take KV cache of others; then requests with embeddings are refused.
        lambda mm, c: (
            mm.enable_mm_embeds and not mm.allow_missing_mm_embeddings and not _adapter(c).eadaprune_takes_embeddings
        ),
        "--enable-mm-embeds is not supported for this model: its embeddings come without their layout in the image",
    ),
    (
        lambda mm, c: mm.video_pruning_rate,
        "--video-pruning-rate is vLLM's own pruning of videos, and cannot be combined with this plugin",
    ),
    (
        lambda mm, c: mm.get_mm_processor_device_type() not in (None, "cpu"),
        "an image processor on the accelerator (--mm-processor-device) is not supported",
    ),
    (
        lambda mm, c: _decodes_on_gpu((mm.media_io_kwargs or {}).get("video") or {}),
        "decoding videos on the GPU (--media-io-kwargs) is not supported: the plugin processes images on the CPU",
    ),
    (
        lambda mm, c: mm.mm_encoder_only and not c.ec_transfer_config,
        "--mm-encoder-only without --ec-transfer-config is not supported: nothing takes what is encoded",
    ),
    (
        lambda mm, c: _connectors(c) & _TRANSFER_CONNECTORS,
        "this --kv-transfer-config is not supported: the decision does not reach the instance that decodes",
    ),
    (
        lambda mm, c: _connectors(c) & _IGNORES_IMAGES,
        "this --kv-transfer-config is not supported: the connector finds blocks by token ids alone, and would take one "
        "image for another",
    ),
    (
        lambda mm, c: _connectors(c) - _STORES - _PULLING_CONNECTORS and not ServerOptions.of(mm).trust_kv_connector,
        "the connector of this --kv-transfer-config is not known; if it finds blocks by vLLM's block hashes or by the "
        "identifiers of images, --eadaprune-trust-kv-connector serves with it",
    ),
    (
        lambda mm, c: c.lora_config and c.lora_config.enable_tower_connector_lora,
        "--enable-tower-connector-lora is not supported: images are encoded before a request's adapter is known",
    ),
    (
        lambda mm, c: c.parallel_config.distributed_executor_backend == "external_launcher",
        "the external launcher (--distributed-executor-backend) is not supported: it has no front end that could send "
        "decision requests for all ranks",
    ),
]


def _has_own_prompt_updates(model: Any) -> bool:
    """Whether vLLM's processor of the model overrides methods that ``PruningProcessor`` overrides or depends on."""
    stock = next(base for base in model._processor_factory.processor.__mro__ if base.__module__.startswith("vllm."))
    names = ("_cached_apply_hf_processor", "_maybe_apply_prompt_updates")
    return any(getattr(stock, name) is not getattr(BaseMultiModalProcessor, name) for name in names)


def _connectors(vllm_config: Any) -> set[str]:
    """The names of all KV connectors."""
    kv_transfer = vllm_config.kv_transfer_config
    if not kv_transfer:
        return set()
    nested = kv_transfer.kv_connector_extra_config.get("connectors", [])
    return {kv_transfer.kv_connector, *(connector.get("kv_connector") for connector in nested)}


def _decodes_on_gpu(video: dict[str, Any]) -> bool:
    backends = {envs.VLLM_VIDEO_LOADER_BACKEND, video.get("backend"), video.get("video_backend")}
    return "cuda" in str(video.get("device")) or bool(backends & {"pynvvideocodec", "deepstream"})


def _unsupported(model_config: Any) -> str:
    """Why a model without an adapter is refused, and what helps."""
    name, served_as = ", ".join(model_config.architectures), model_config.architecture
    if not model_config.is_multimodal_model:
        return f"{name} is a model without images and videos, so there is nothing to prune"
    if served_as in _MULTIMODAL_MODELS:
        reason = f"{name} is not supported: --eadaprune-any-model tries it"
    else:
        reason = f"vLLM serves {name} as {served_as}, which is not supported"
    return f"{reason}. Supported are {', '.join(ARCHITECTURES)}"


def _adapter(vllm_config: Any) -> Any:
    return adapter(vllm_config.model_config.architecture)


def check(vllm_config: Any) -> None:
    """Raises:
    StartupError: if the model or another setting is not supported, or vLLM's class of the model has other methods than
        the adapter overrides.
    """
    model_config = vllm_config.model_config
    if model_config.architecture not in ARCHITECTURES:
        raise StartupError(_unsupported(model_config))
    check_overrides(sys.modules[_adapter(vllm_config).__module__])
    for applies, reason in _REFUSED:
        if applies(model_config.multimodal_config, vllm_config):
            raise StartupError(reason)
