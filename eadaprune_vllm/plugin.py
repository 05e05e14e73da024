"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

Installed is not active: until the plugin is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, all it does is
to add its flags to vLLM's command line.
"""

from importlib import import_module

from eadaprune_vllm.naming import NAME, named_plugins

# Of the start, of the engine, of rendering requests, and of sending them to it; ``command_line`` comes without them.
_SEAMS = (
    *("configuration", "reference"),
    *("engine", "graphs", "weights"),
    *("rendering", "pooling", "scoring", "run_batch", "anthropic", "cohere"),
    *("admission", "sent"),
)


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

    models.register()
    for seam in _SEAMS:
        import_module(f"eadaprune_vllm.seams.{seam}").install()
