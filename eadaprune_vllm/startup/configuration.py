"""Completes vLLM's configuration with the plugin's."""

import logging
from collections.abc import Sequence
from typing import Any

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import KEY, overlay
from eadaprune_vllm.core.server_info import Reference
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.core.words import percent
from eadaprune_vllm.engine.extension import extended
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.startup.flags import in_flags

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
        raise StartupError(in_flags(str(error), ["load_aware"])) from None
    setattr(multimodal, KEY, options)
    return options


def log_defaults(options: ServerOptions) -> None:
    """Log the effective defaults, and what they keep of the reference pictures.

    Args:
        options: the operator's, with curves.
    """
    reference, effective, target = Reference.of(options), options.resolve(), options.target
    found = effective.target
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
    logger.info("eadaprune: energy %g keeps %s", effective.threshold, reference)
    if reference.at_bound > MAX_AT_BOUND:
        logger.warning(
            "eadaprune: for %s of the reference pictures min_share, min_tokens or max_tokens determines the budget "
            "instead of the threshold",
            percent(reference.at_bound),
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
        raise StartupError(str(error).removeprefix(f"{KEY}: ").removeprefix(f"{KEY}.")) from None
    if energy is not None and not (isinstance(given, dict) and "energy" in given):
        logger.info(
            "eadaprune: energy is %g by default for this model, because pages of text lose most by pruning; "
            "--%s-energy or a request may set another",
            energy,
            KEY,
        )
    return options
