"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

Installed is not active: until the plugin is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, all it does is
to add its flags to vLLM's command line.
"""

from eadaprune_vllm.naming import NAME, named_plugins


def register() -> None:
    """Add the flags; if the plugin is named, activate it as well."""
    from eadaprune_vllm.seams import command_line

    if NAME in (named_plugins() or ()):
        activate()
    command_line.install()


def activate() -> None:
    """Put our models in the place of vLLM's and hook into configuration, requests and metrics.

    Raises:
        StartupError: if vLLM is of no supported version, or lacks what pruning depends on.
    """
    from eadaprune_vllm.seams.window import check_version

    check_version()  # before anything that may fail to import from another one
    from eadaprune_vllm import models
    from eadaprune_vllm.seams import (
        admission,
        anthropic,
        configuration,
        engine,
        graphs,
        pooling,
        reference,
        rendering,
        run_batch,
        sent,
        weights,
    )

    models.register()
    seams = (
        admission,
        anthropic,
        configuration,
        engine,
        graphs,
        pooling,
        reference,
        rendering,
        run_batch,
        sent,
        weights,
    )
    for seam in seams:
        seam.install()
