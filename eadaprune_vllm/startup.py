"""Whether a configuration of vLLM can be served with pruning, and the front end it takes."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import envs
from vllm.multimodal.processing import BaseMultiModalProcessor

from eadaprune_vllm.asking import Asker
from eadaprune_vllm.budget import Curve
from eadaprune_vllm.engine.extended import extended
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.load import Load
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.models import ARCHITECTURES, adapter
from eadaprune_vllm.models.generic import RowPerPlaceholder
from eadaprune_vllm.options import KEY, overlay
from eadaprune_vllm.report import Reference
from eadaprune_vllm.seams.processes import front_ends
from eadaprune_vllm.seams.wrap import check_overrides
from eadaprune_vllm.server_options import ServerOptions

logger = logging.getLogger("vllm." + __name__)
MOST_AT_BOUND = 0.5  # of the reference pictures, before it is worth a warning
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
        lambda mm, c: _has_prompts_of_its_own(_adapter(c)),
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
    (
        lambda mm, c: c.weight_transfer_config and front_ends(c) > 1,
        "--weight-transfer-config is not supported with several API servers: each remembers what old weights made",
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


def configure(vllm_config: Any, options: ServerOptions) -> None:
    """Put the options where front ends find them, and have workers answer.

    Args:
        vllm_config: checked.
        options: the operator's.
    """
    setattr(vllm_config.model_config.multimodal_config, KEY, options)
    parallel = vllm_config.parallel_config
    parallel.worker_extension_cls = extended(parallel.worker_extension_cls)


def inform(vllm_config: Any, curves: Sequence[Curve]) -> ServerOptions:
    """Tell a configuration's options which thresholds targets stand for.

    Args:
        vllm_config: configured.
        curves: of the model's reference pictures.

    Returns:
        The options, informed.

    Raises:
        StartupError: if load would lower nothing.
    """
    multimodal = vllm_config.model_config.multimodal_config
    try:
        options = ServerOptions.of(multimodal).informed(curves)
    except ValueError as error:
        raise StartupError(str(error)) from None
    setattr(multimodal, KEY, options)
    return options


def say(options: ServerOptions) -> None:
    """Log what the defaults come to.

    Args:
        options: the operator's, informed.
    """
    reference, target = Reference.of(options), options.target
    found = reference.options.target
    if target is not None and found is None:
        logger.warning("eadaprune: target %g is outside the bounds of energies that the server has", target)
    elif found != target:
        logger.warning(
            "eadaprune: target %g is out of reach of this model, which keeps %.3f to %.3f of the reference pictures' "
            "tokens; it is %.3f, where their budgets still differ",
            target,
            reference.least_target,
            reference.most_target,
            found,
        )
    logger.info("eadaprune: %s", reference)
    if reference.at_bound > MOST_AT_BOUND:
        logger.warning(
            "eadaprune: %.0f%% of the reference pictures keep what min_share, min_tokens or max_tokens say, whatever "
            "their content",
            100 * reference.at_bound,
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


def operator_options(given: object, energy: float | None = None) -> ServerOptions:
    """What the operator set, by flags and ``--mm-processor-kwargs``.

    Args:
        given: that.
        energy: the default of this option, if the model has one of its own.

    Raises:
        StartupError: naming option, value and allowed range.
    """
    defaults = ServerOptions() if energy is None else ServerOptions(energy=energy)
    try:
        options = overlay(defaults, given, where=KEY)
    except InvalidOptionsError as error:
        raise StartupError(str(error)) from None
    if energy is not None and not (isinstance(given, dict) and "energy" in given):
        logger.info(
            "eadaprune: energy is %g by default for this model, as pages of text would lose most; --%s-energy or a "
            "request may set another",
            energy,
            KEY,
        )
    return options


def front_end(vllm_config: Any) -> FrontEnd:
    """What this process asks and counts with.

    Raises:
        StartupError: if the configuration was never checked.
    """
    model = vllm_config.model_config
    if not hasattr(model.multimodal_config, KEY):
        raise StartupError("only vllm serve, vllm run-batch and LLM(...) are supported, not vllm launch render")
    policy, load = ServerOptions.of(model.multimodal_config).load_aware, None
    if policy:
        parallel = vllm_config.parallel_config
        # As vLLM's client counts the engines it manages.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, _shared_by_front_ends(front_ends(vllm_config)))
    asker = Asker(vllm_config.scheduler_config.max_num_encoder_input_tokens)
    return FrontEnd(asker, _metrics(), model.served_model_name, kv_bytes_per_token(vllm_config), load)


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
    """KV cache of one token: a key and a value per KV head, or the one latent vector of MLA, for each layer that has
    any, in the cache's dtype; 0 if vLLM does not say how large that is."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    name = vllm_config.cache_config.cache_dtype
    try:
        dtype: torch.dtype = kv_cache_dtype_str_to_dtype(name, model)
    except KeyError:
        logger.warning("The size of the KV cache's dtype %s is not known, so kv_cache_bytes_saved will be 0", name)
        return 0
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    layers = model.get_total_num_hidden_layers()
    layers -= (getattr(model.hf_text_config, "layer_types", None) or []).count("linear_attention")
    return int(layers * vectors * model.get_head_size() * dtype.itemsize)
