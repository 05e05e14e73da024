"""Start-up: flags, checks of vLLM's configuration, and its completion."""
