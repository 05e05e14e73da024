"""Completes vLLM's configuration with the plugin's, and creates the front end."""

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
MAX_AT_BOUND = 0.5  # share of the reference pictures at a bound, above which the log has a warning


def configure(vllm_config: Any, options: ServerOptions) -> None:
    """Put the options into the configuration, and add the worker extension.

    Args:
        vllm_config: vLLM's, checked.
        options: the operator's.
    """
    setattr(vllm_config.model_config.multimodal_config, KEY, options)
    parallel = vllm_config.parallel_config
    parallel.worker_extension_cls = extended(parallel.worker_extension_cls)


def set_curves(vllm_config: Any, curves: Sequence[Curve]) -> ServerOptions:
    """Put the spectra of the reference pictures into the options, which need them to resolve targets.

    Args:
        vllm_config: vLLM's, with our options.
        curves: of the model's reference pictures.

    Returns:
        The options with curves.

    Raises:
        StartupError: if load would not lower the default threshold.
    """
    multimodal = vllm_config.model_config.multimodal_config
    try:
        options = ServerOptions.of(multimodal).with_curves(curves)
    except ValueError as error:
        raise StartupError(str(error)) from None
    setattr(multimodal, KEY, options)
    return options


def log_defaults(options: ServerOptions) -> None:
    """Log the effective defaults, and what they keep of the reference pictures.

    Args:
        options: the operator's, with curves.
    """
    reference, target = Reference.of(options), options.target
    found = reference.options.target
    if target is not None and found is None:
        logger.warning(
            "eadaprune: the energy of target %g is outside energy_floor and energy_ceiling; the nearer of them is used",
            target,
        )
    elif found != target:
        logger.warning(
            "eadaprune: target %g is not reachable with this model, whose thresholds keep %.3f to %.3f of the tokens "
            "of the reference pictures; %.3f is used, where budgets still differ between pictures",
            target,
            reference.min_target,
            reference.max_target,
            found,
        )
    logger.info("eadaprune: %s", reference)
    if reference.at_bound > MAX_AT_BOUND:
        logger.warning(
            "eadaprune: for %.0f%% of the reference pictures min_share, min_tokens or max_tokens determines the budget "
            "instead of the threshold",
            100 * reference.at_bound,
        )


def check_load_aware(serving: bool, engine_args: Any) -> None:
    """Raises:
    StartupError: if thresholds cannot follow the load.
    """
    flag = "--eadaprune-load-aware"
    if not serving:
        raise StartupError(f"{flag} works in vllm serve only: offline, all requests arrive before the first step")
    if engine_args.disable_log_stats:
        raise StartupError(f"{flag} needs vLLM's statistics, which --disable-log-stats switches off")
    if engine_args.enable_elastic_ep:
        raise StartupError(f"{flag} is not supported with --enable-elastic-ep, which replaces vLLM's statistics")


def operator_options(given: object, energy: float | None = None) -> ServerOptions:
    """The operator's options.

    Args:
        given: by flags or ``--mm-processor-kwargs``.
        energy: the model's default, if it has one.

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
            "eadaprune: energy is %g by default for this model, because pages of text lose most by pruning; "
            "--%s-energy or a request may set another",
            energy,
            KEY,
        )
    return options


def front_end(vllm_config: Any) -> FrontEnd:
    """The front end of this process.

    Raises:
        StartupError: if ``configure`` was never called.
    """
    model = vllm_config.model_config
    if not hasattr(model.multimodal_config, KEY):
        raise StartupError("only vllm serve, vllm run-batch and LLM(...) are supported, not vllm launch render")
    count = int(vllm_config.parallel_config._api_process_count)  # API servers on this node
    policy, load = ServerOptions.of(model.multimodal_config).load_aware, None
    if policy:
        parallel = vllm_config.parallel_config
        # The same number as in vLLM's engine client.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, _shared_file("load", count))
    decision_client = DecisionClient(vllm_config.scheduler_config.max_num_encoder_input_tokens)
    return FrontEnd(
        decision_client,
        _metrics(),
        model.served_model_name,
        kv_bytes_per_token(vllm_config),
        load,
        _shared_file("weights", count),
    )


def _shared_file(name: str, count: int) -> Path | None:
    """A file that all API servers of this server share, and vLLM removes; None if there is only one API server."""
    if count == 1:
        return None
    # vLLM's folder for metrics. Other servers may use it too, or this one's predecessor in its container, but their API
    # servers have another parent process.
    parent = psutil.Process(os.getppid())
    return Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"{KEY}-{name}-{parent.pid}-{parent.create_time()}")


@functools.cache
def _metrics() -> Metrics:
    """The metrics of this process. A registry accepts each name once."""
    return Metrics()


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of one token in bytes: a key and a value per KV head, or the latent vector of MLA, for each layer with a
    KV cache, in the cache's dtype; 0 if the size of the dtype is not known."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    name = vllm_config.cache_config.cache_dtype
    try:
        dtype: torch.dtype = kv_cache_dtype_str_to_dtype(name, model)
    except KeyError:
        logger.warning("The size of KV cache dtype %s is not known, so kv_cache_bytes_saved will be 0", name)
        return 0
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    layers = model.get_total_num_hidden_layers()
    layers -= (getattr(model.hf_text_config, "layer_types", None) or []).count("linear_attention")
    return int(layers * vectors * model.get_head_size() * dtype.itemsize)
