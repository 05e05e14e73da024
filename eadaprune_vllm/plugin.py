"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

An installed plugin is not active yet. Until it is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, it only adds
its flags to vLLM's command line.
"""

from importlib import import_module

from eadaprune_vllm.startup.naming import NAME, named_plugins

# In the order of a request: start-up, engine, rendering, sending. ``command_line`` is installed by itself.
_PATCHES = (
    *("config", "engine_core", "scheduler", "engine_client"),
    *("cudagraph", "weights"),
    *("renderer", "pooling", "scoring", "run_batch", "anthropic", "cohere"),
    *("input_processor", "sender_cache"),
)


def register() -> None:
    """Add the flags; if the plugin is named, activate it as well."""
    from eadaprune_vllm.patches import command_line

    if NAME in (named_plugins() or ()):
        activate()
    command_line.install()


def activate() -> None:
    """Register our models over vLLM's and apply the patches.

    Raises:
        StartupError: if this vLLM is not supported, or lacks what pruning depends on.
    """
    from eadaprune_vllm.compat import check_version

    check_version()  # before any import that may fail with another version
    from eadaprune_vllm import architectures

    architectures.register()
    for patch in _PATCHES:
        import_module(f"eadaprune_vllm.patches.{patch}").install()
