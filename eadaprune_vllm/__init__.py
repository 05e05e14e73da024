"""EAdaPrune: per-image visual token budgets for vision-language models on stock vLLM."""

__version__ = "0.1.0"
__all__ = ["__version__"]
