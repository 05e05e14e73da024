"""Whether a configuration of vLLM can be served with pruning, and the front end it takes."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import envs

from eadaprune_vllm import device
from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.encoder import VisionEncoder, compute_dtype
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.load import Load
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.models import ARCHITECTURES, adapter, encoder_class
from eadaprune_vllm.options import KEY, ServerOptions, overlay
from eadaprune_vllm.seams.processes import front_ends, speaks_for_server
from eadaprune_vllm.seams.wrap import check_overrides

logger = logging.getLogger("vllm." + __name__)

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
        lambda mm, c: mm.get_mm_processor_device_type() not in (None, "cpu"),
        "an image processor on the accelerator (--mm-processor-device) is not supported",
    ),
    (
        lambda mm, c: _decodes_on_gpu((mm.media_io_kwargs or {}).get("video") or {}),
        "decoding videos on the GPU (--media-io-kwargs) is not supported: images are prepared on the CPU",
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
    StartupError: if the model is not one of ours, vLLM's class of it is not as we know it, vLLM was told something that
        pruning in the front end cannot honour, or the vision tower is of an unsupported kind or lacks weights.
    """
    model_config = vllm_config.model_config
    if model_config.architecture not in ARCHITECTURES:
        raise StartupError(
            f"the architecture {model_config.architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    check_overrides(sys.modules[adapter(model_config.architecture).__module__])
    for applies, reason in _REFUSED:
        if applies(model_config.multimodal_config, vllm_config):
            raise StartupError(reason)
    _checkpoint(vllm_config).check(_build(vllm_config))


def configure(vllm_config: Any, options: ServerOptions, tower: bool) -> None:
    """Put the options where front ends find them and, if the tower goes to the engine's GPU, have the engine leave room
    for it there.

    Args:
        vllm_config: checked.
        options: the operator's.
        tower: whether there are front ends on this node.

    Raises:
        StartupError: if the tower's device is missing, or the operator left too little room on it.
    """
    multimodal = vllm_config.model_config.multimodal_config
    setattr(multimodal, KEY, options)
    if not tower or not device.is_engines(where := device.resolve(options.device)):
        return
    weights, count = _checkpoint(vllm_config, where).nbytes(_build(vllm_config)), front_ends(vllm_config)
    if given := multimodal.mm_ipc_gpu_memory_gb:
        device.check_room(given, weights, count)
        return
    multimodal.mm_ipc_gpu_memory_gb = room = device.room(weights, count)
    if speaks_for_server(vllm_config):
        logger.info(
            "The vision tower will be on %s: %.2f GiB are left to %d front end(s) there, of what would be KV cache "
            "(--mm-ipc-gpu-memory-gb)",
            where,
            room,
            count,
        )


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


def _build(vllm_config: Any) -> Callable[[], VisionEncoder]:
    return functools.partial(_encoder(vllm_config), vllm_config.model_config.hf_config)


def _checkpoint(vllm_config: Any, where: torch.device = device.CPU) -> Checkpoint:
    """Where vLLM reads the served model's weights from, for a tower that computes there."""
    model, load = vllm_config.model_config, vllm_config.load_config
    return Checkpoint(
        model=model.model,
        revision=model.revision,
        download_dir=load.download_dir,
        load_format=str(load.load_format),
        dtype=compute_dtype(model.dtype, where),
        token=model.hf_token,
        device=where,
    )


def front_end(vllm_config: Any) -> FrontEnd:
    """Load the tower into this process.

    Raises:
        StartupError: if it cannot be loaded, or the configuration was never checked.
    """
    model = vllm_config.model_config
    if not hasattr(model.multimodal_config, KEY):
        raise StartupError("only vllm serve, vllm run-batch and LLM(...) are supported, not vllm launch render")
    options, count = getattr(model.multimodal_config, KEY), front_ends(vllm_config)
    where, limit = device.resolve(options.device), None
    # An engine in this process would fall under the limit too.
    if device.is_engines(where) and envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        limit = device.limit(model.multimodal_config.mm_ipc_gpu_memory_gb, count)
    encoder = _checkpoint(vllm_config, where).load(_build(vllm_config))
    load, policy = None, options.load_aware
    if policy:
        parallel = vllm_config.parallel_config
        # As vLLM's client counts the engines it manages.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, _shared_by_front_ends(count))
    kv_bytes = kv_bytes_per_token(vllm_config)
    return FrontEnd(encoder, model.dtype, _metrics(), model.served_model_name, kv_bytes, load, where, limit)


def _shared_by_front_ends(count: int) -> Path | None:
    """A file of this server that all of its front ends find, and vLLM removes; None if there is only one of them."""
    if count == 1:
        return None
    # They share this folder for their metrics. So may other servers, and this one's predecessor in its container, but
    # their front ends have another parent.
    parent = psutil.Process(os.getppid())
    return Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"{KEY}-load-{parent.pid}-{parent.create_time()}")


@functools.cache
def _metrics() -> Metrics:
    """The metrics of this process; a registry takes each name once."""
    return Metrics()


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of one token: a key and a value per KV head and layer, in the cache's dtype; 0 if vLLM does not say how
    large that is."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    name = vllm_config.cache_config.cache_dtype
    try:
        dtype: torch.dtype = kv_cache_dtype_str_to_dtype(name, model)
    except KeyError:
        logger.warning("The size of the KV cache's dtype %s is not known, so kv_cache_bytes_saved will be 0", name)
        return 0
    heads, layers = model.get_total_num_kv_heads(), model.get_total_num_hidden_layers()
    return int(2 * layers * heads * model.get_head_size() * dtype.itemsize)
