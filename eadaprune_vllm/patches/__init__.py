"""Patches of vLLM: where its functions are wrapped or replaced. Each file is about one place, in one process."""
