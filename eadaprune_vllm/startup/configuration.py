"""What a configuration of vLLM becomes with pruning, and the front end it takes."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import KEY, overlay
from eadaprune_vllm.core.report import Reference
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.extension import extended
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.load import Load
from eadaprune_vllm.frontend.metrics import Metrics

logger = logging.getLogger("vllm." + __name__)
MOST_AT_BOUND = 0.5  # of the reference pictures, before it is worth a warning


def configure(vllm_config: Any, options: ServerOptions) -> None:
    """Put the options where front ends find them, and have workers answer.

    Args:
        vllm_config: checked.
        options: the operator's.
    """
    setattr(vllm_config.model_config.multimodal_config, KEY, options)
    parallel = vllm_config.parallel_config
    parallel.worker_extension_cls = extended(parallel.worker_extension_cls)


def set_curves(vllm_config: Any, curves: Sequence[Curve]) -> ServerOptions:
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
            reference.min_target,
            reference.max_target,
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
    count = int(vllm_config.parallel_config._api_process_count)  # on this node
    policy, load = ServerOptions.of(model.multimodal_config).load_aware, None
    if policy:
        parallel = vllm_config.parallel_config
        # As vLLM's client counts the engines it manages.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, _shared_by_front_ends("load", count))
    decision_client = DecisionClient(vllm_config.scheduler_config.max_num_encoder_input_tokens)
    return FrontEnd(
        decision_client,
        _metrics(),
        model.served_model_name,
        kv_bytes_per_token(vllm_config),
        load,
        _shared_by_front_ends("weights", count),
    )


def _shared_by_front_ends(what: str, count: int) -> Path | None:
    """A file of this server that all of its front ends find, and vLLM removes; None if there is only one of them."""
    if count == 1:
        return None
    # They share this folder for their metrics. So may other servers, and this one's predecessor in its container, but
    # their front ends have another parent.
    parent = psutil.Process(os.getppid())
    return Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"{KEY}-{what}-{parent.pid}-{parent.create_time()}")


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
