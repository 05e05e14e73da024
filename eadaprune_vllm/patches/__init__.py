"""Where functions of vLLM are wrapped or replaced: one file for each place, of one process."""
