"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process, possibly more than once.

Installed is not active: until the plugin is named, by ``--plugin eadaprune`` or in ``VLLM_PLUGINS``, all it does is
to add its flags to vLLM's command line.
"""

from importlib import import_module

from eadaprune_vllm.startup.naming import NAME, named_plugins

# Of the start, of the engine, of rendering requests, and of sending them to it; ``command_line`` comes without them.
_PATCHES = (
    *("config", "engine_core", "engine_client"),
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
        StartupError: if vLLM is of no supported version, or lacks what pruning depends on.
    """
    from eadaprune_vllm.compat import check_version

    check_version()  # before anything that may fail to import from another one
    from eadaprune_vllm import architectures

    architectures.register()
    for patch in _PATCHES:
        import_module(f"eadaprune_vllm.patches.{patch}").install()
