"""Whether a configuration of vLLM can be served with pruning, and the front end it takes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import envs

from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.compat import processor_device
from eadaprune_vllm.encoder import VisionEncoder, compute_dtype
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.hooks import shared_by_front_ends
from eadaprune_vllm.load import Load
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.models import ARCHITECTURES, encoder_class
from eadaprune_vllm.options import KEY, ServerOptions, overlay

_NO_TOWER = "is not supported: the engine has no vision tower"
# What vLLM can be told that pruning in the front end cannot honour: (is it so in the multimodal configuration, or in
# the whole one?, why not).
_REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (
        lambda mm, c: envs.VLLM_USE_RUST_FRONTEND,
        "the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported: it runs no Python plugin",
    ),
    (
        lambda mm, c: envs.VLLM_USE_MODELSCOPE,
        "ModelScope (VLLM_USE_MODELSCOPE) is not supported; serve a local folder instead",
    ),
    (
        lambda mm, c: not any(mm.get_limit_per_prompt(modality) for modality in _encoder(c).modalities),
        "images and videos are switched off (--language-model-only or --limit-mm-per-prompt), so there is nothing to "
        "prune",
    ),
    (
        lambda mm, c: mm.enable_mm_embeds and not _encoder(c).takes_embeddings,
        "--enable-mm-embeds is not supported for this model: its embeddings do not say where lines of the picture end",
    ),
    (
        lambda mm, c: mm.video_pruning_rate,
        "--video-pruning-rate is vLLM's own pruning of videos and cannot be combined with this plugin",
    ),
    (
        lambda mm, c: processor_device(mm) != "cpu",
        "an image processor on the accelerator (--mm-processor-device) is not supported",
    ),
    (
        lambda mm, c: _decodes_on_gpu((mm.media_io_kwargs or {}).get("video") or {}),
        "decoding videos on the GPU (--media-io-kwargs) is not supported: the vision tower is on the CPU",
    ),
    (lambda mm, c: mm.mm_encoder_only, f"--mm-encoder-only {_NO_TOWER}"),
    (lambda mm, c: mm.mm_encoder_tp_mode == "data", f"--mm-encoder-tp-mode data {_NO_TOWER}"),
    (lambda mm, c: mm.mm_encoder_attn_backend, f"--mm-encoder-attn-backend {_NO_TOWER}"),
    (lambda mm, c: mm.mm_encoder_attn_dtype, f"--mm-encoder-attn-dtype {_NO_TOWER}"),
    (lambda mm, c: c.compilation_config.cudagraph_mm_encoder, f"cudagraph_mm_encoder {_NO_TOWER}"),
    (lambda mm, c: c.compilation_config.compile_mm_encoder, f"compile_mm_encoder {_NO_TOWER}"),
    (lambda mm, c: c.ec_transfer_config, f"--ec-transfer-config {_NO_TOWER}"),
    (
        lambda mm, c: c.lora_config and c.lora_config.enable_tower_connector_lora,
        f"--enable-tower-connector-lora {_NO_TOWER}",
    ),
]


def _decodes_on_gpu(video: dict[str, Any]) -> bool:
    backends = {envs.VLLM_VIDEO_LOADER_BACKEND, video.get("backend"), video.get("video_backend")}
    return "cuda" in str(video.get("device")) or bool(backends & {"pynvvideocodec", "deepstream"})


def _encoder(vllm_config: Any) -> type[VisionEncoder]:
    return encoder_class(vllm_config.model_config.architecture)


def check(vllm_config: Any) -> None:
    """Raises:
    StartupError: if the model is not one of ours, vLLM was told something that pruning in the front end cannot
        honour, or the vision tower is of an unsupported kind or lacks weights.
    """
    model_config = vllm_config.model_config
    if model_config.architecture not in ARCHITECTURES:
        raise StartupError(
            f"the architecture {model_config.architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    for applies, reason in _REFUSED:
        if applies(model_config.multimodal_config, vllm_config):
            raise StartupError(reason)
    _checkpoint(vllm_config).check(functools.partial(_encoder(vllm_config), model_config.hf_config))


def check_load_aware(serving: bool, engine_args: Any) -> None:
    """Raises:
    StartupError: if thresholds cannot follow the load.
    """
    flag = "--eadaprune-load-aware"
    if not serving:
        raise StartupError(f"{flag} works in vllm serve only: offline, all requests are there before the first step")
    if engine_args.disable_log_stats:
        raise StartupError(f"{flag} needs the statistics that --disable-log-stats switches off")
    if engine_args.enable_elastic_ep:
        raise StartupError(f"{flag} is not supported with --enable-elastic-ep: it replaces the statistics")


def server_options(given: object) -> ServerOptions:
    """What the operator set, by flags and ``--mm-processor-kwargs``.

    Raises:
        StartupError: naming option, value and allowed range.
    """
    try:
        return overlay(ServerOptions(), given, where=KEY)
    except InvalidOptionsError as error:
        raise StartupError(str(error)) from None


def _checkpoint(vllm_config: Any) -> Checkpoint:
    """Where vLLM reads the served model's weights from."""
    model, load = vllm_config.model_config, vllm_config.load_config
    return Checkpoint(
        model=model.model,
        revision=model.revision,
        download_dir=load.download_dir,
        load_format=str(load.load_format),
        dtype=compute_dtype(model.dtype),
        token=model.hf_token,
    )


def front_end(vllm_config: Any) -> FrontEnd:
    """Load the tower into this process.

    Raises:
        StartupError: if it cannot be loaded, or the configuration was never checked.
    """
    model = vllm_config.model_config
    if not hasattr(model.multimodal_config, KEY):
        raise StartupError("only vllm serve, vllm run-batch and LLM(...) are supported, not vllm launch render")
    encoder = _checkpoint(vllm_config).load(functools.partial(_encoder(vllm_config), model.hf_config))
    load, policy = None, getattr(model.multimodal_config, KEY).load_aware
    if policy:
        parallel = vllm_config.parallel_config
        # As vLLM's client counts the engines it manages.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, shared_by_front_ends(vllm_config))
    kv_bytes = kv_bytes_per_token(vllm_config)
    return FrontEnd(encoder, model.dtype, _metrics(), model.served_model_name, kv_bytes, load)


@functools.cache
def _metrics() -> Metrics:
    """The metrics of this process; a registry takes each name once."""
    return Metrics()


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of one token: a key and a value per KV head and layer, in the cache's dtype."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    dtype: torch.dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
    heads, layers = model.get_total_num_kv_heads(), model.get_total_num_hidden_layers()
    return int(2 * layers * heads * model.get_head_size() * dtype.itemsize)
