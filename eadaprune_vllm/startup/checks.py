"""Whether a configuration of vLLM can be served with pruning."""

import sys
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.multimodal.processing import BaseMultiModalProcessor

from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.generic import RowPerPlaceholder
from eadaprune_vllm.patching import check_overrides

_HAND_OVER = {
    "MoRIIOConnector",
    "MooncakeConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "P2pNcclConnector",
}

# What vLLM can be told that pruning cannot honour: (is it so in the multimodal configuration, or in the whole one?,
# why not).
_REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (
        lambda mm, c: envs.VLLM_USE_RUST_FRONTEND,
        "the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported: it runs no Python plugin",
    ),
    (
        lambda mm, c: c.model_config.is_encoder_decoder,
        "this model is an encoder-decoder, whose prompt has no place for images",
    ),
    (
        lambda mm, c: issubclass(_adapter(c), RowPerPlaceholder) and c.model_config.uses_mrope,
        "this model has M-RoPE positions, and how to keep those of the tokens that stay is not known for it",
    ),
    (
        lambda mm, c: "__new__" in vars(_adapter(c).__bases__[-1]),
        "vLLM's class of this model makes one of several others, before which the plugin has none",
    ),
    (
        lambda mm, c: issubclass(_adapter(c), RowPerPlaceholder) and _has_prompts_of_its_own(_adapter(c)),
        "the processor of this model fills placeholders into prompts in a way of its own",
    ),
    (
        lambda mm, c: (
            c.model_config.architecture == "LlavaForConditionalGeneration"
            and c.model_config.hf_config.vision_config.model_type == "pixtral"
        ),
        "the vision tower of this model is of type 'pixtral', whose layout is not known",
    ),
    (
        lambda mm, c: not any(mm.get_limit_per_prompt(modality) for modality in _adapter(c).eadaprune_modalities),
        "images and videos are switched off (--language-model-only or --limit-mm-per-prompt), so there is nothing to "
        "prune",
    ),
    (
        lambda mm, c: mm.enable_mm_embeds and not _adapter(c).eadaprune_takes_embeddings,
        "--enable-mm-embeds is not supported for this model: its embeddings do not say where in the picture they are",
    ),
    (
        lambda mm, c: mm.video_pruning_rate,
        "--video-pruning-rate is vLLM's own pruning of videos and cannot be combined with this plugin",
    ),
    (
        lambda mm, c: mm.get_mm_processor_device_type() not in (None, "cpu"),
        "an image processor on the accelerator (--mm-processor-device) is not supported",
    ),
    (
        lambda mm, c: _decodes_on_gpu((mm.media_io_kwargs or {}).get("video") or {}),
        "decoding videos on the GPU (--media-io-kwargs) is not supported: images are prepared on the CPU",
    ),
    (lambda mm, c: mm.mm_encoder_only, "--mm-encoder-only is not supported: other instances would decide again"),
    (
        lambda mm, c: c.ec_transfer_config,
        "--ec-transfer-config is not supported: other instances do not know what is kept of an image",
    ),
    (
        lambda mm, c: c.kv_transfer_config and _hands_over(c.kv_transfer_config),
        "this --kv-transfer-config is not supported: other instances would decide again about the images of a request",
    ),
    (
        lambda mm, c: c.lora_config and c.lora_config.enable_tower_connector_lora,
        "--enable-tower-connector-lora is not supported: images are encoded before it is known for which adapter",
    ),
    (
        lambda mm, c: c.parallel_config.distributed_executor_backend == "external_launcher",
        "the external launcher (--distributed-executor-backend) is not supported: no process asks for the others",
    ),
]


def _has_prompts_of_its_own(model: Any) -> bool:
    """Whether vLLM's processor of it does itself what ours goes between."""
    stock = next(base for base in model._processor_factory.processor.__mro__ if base.__module__.startswith("vllm."))
    names = ("_cached_apply_hf_processor", "_maybe_apply_prompt_updates")
    return any(getattr(stock, name) is not getattr(BaseMultiModalProcessor, name) for name in names)


def _hands_over(kv_transfer: Any) -> bool:
    """Whether blocks of a request go from one instance to another. Other connectors store blocks by their hashes, in
    which what is kept of an image is."""
    several = kv_transfer.kv_connector_extra_config.get("connectors", [])
    names = {kv_transfer.kv_connector, *(connector.get("kv_connector") for connector in several)}
    return bool(names & _HAND_OVER)


def _decodes_on_gpu(video: dict[str, Any]) -> bool:
    backends = {envs.VLLM_VIDEO_LOADER_BACKEND, video.get("backend"), video.get("video_backend")}
    return "cuda" in str(video.get("device")) or bool(backends & {"pynvvideocodec", "deepstream"})


def _adapter(vllm_config: Any) -> Any:
    return adapter(vllm_config.model_config.architecture)


def check(vllm_config: Any) -> None:
    """Raises:
    StartupError: if the model is not one of ours or of an unsupported kind, vLLM's class of it is not as we know it, or
        vLLM was told something that pruning cannot honour.
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
