"""Whether a configuration of vLLM can be served with pruning."""

import sys
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.multimodal.processing import BaseMultiModalProcessor

from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.generic import EmbedPerPlaceholder
from eadaprune_vllm.patching import check_overrides

_TRANSFER_CONNECTORS = {
    "MoRIIOConnector",
    "MooncakeConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "P2pNcclConnector",
}

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
        lambda mm, c: mm.enable_mm_embeds and not _adapter(c).eadaprune_takes_embeddings,
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
        lambda mm, c: mm.mm_encoder_only,
        "--mm-encoder-only is not supported: the decision does not reach the other instances",
    ),
    (
        lambda mm, c: c.ec_transfer_config,
        "--ec-transfer-config is not supported: the decision does not reach the other instances",
    ),
    (
        lambda mm, c: c.kv_transfer_config and _transfers_blocks(c.kv_transfer_config),
        "this --kv-transfer-config is not supported: the decision does not reach the instance that decodes",
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


def _transfers_blocks(kv_transfer: Any) -> bool:
    """Whether a connector transfers the blocks of a request to another instance. Other connectors store blocks by their
    hashes, which depend on the kept tokens."""
    nested = kv_transfer.kv_connector_extra_config.get("connectors", [])
    names = {kv_transfer.kv_connector, *(connector.get("kv_connector") for connector in nested)}
    return bool(names & _TRANSFER_CONNECTORS)


def _decodes_on_gpu(video: dict[str, Any]) -> bool:
    backends = {envs.VLLM_VIDEO_LOADER_BACKEND, video.get("backend"), video.get("video_backend")}
    return "cuda" in str(video.get("device")) or bool(backends & {"pynvvideocodec", "deepstream"})


def _adapter(vllm_config: Any) -> Any:
    return adapter(vllm_config.model_config.architecture)


def check(vllm_config: Any) -> None:
    """Raises:
    StartupError: if the model or another setting is not supported, or vLLM's class of the model has other methods than
        the adapter overrides.
    """
    model_config = vllm_config.model_config
    if model_config.architecture not in ARCHITECTURES:
        raise StartupError(
            f"the architecture {model_config.architecture} is not supported; supported are {', '.join(ARCHITECTURES)}, "
            "and --eadaprune-any-model tries others that vLLM ships"
        )
    check_overrides(sys.modules[_adapter(vllm_config).__module__])
    for applies, reason in _REFUSED:
        if applies(model_config.multimodal_config, vllm_config):
            raise StartupError(reason)
