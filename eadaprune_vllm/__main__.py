"""``python -m eadaprune_vllm`` is the ``eadaprune`` command."""

from eadaprune_vllm.cli import app

app(prog_name="eadaprune")
