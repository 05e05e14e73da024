"""The ``eadaprune`` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Per-image visual token budgets on stock vLLM.")


@app.command("demo-model")
def demo_model() -> None:
    """Print the folder of the embedded model, made on first use. Its weights are random."""
    from eadaprune_vllm.demo.model import demo_model

    print(demo_model())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the server's log.")] = Path("demo-output"),
) -> None:
    """Serve the embedded model with the plugin, send it pictures at several thresholds, show what was saved."""
    from eadaprune_vllm.demo.model import demo_model
    from eadaprune_vllm.demo.run import run_demo

    console = Console()
    with console.status("Making the embedded model"):
        model = demo_model()
    run_demo(model, output, console)


if __name__ == "__main__":
    app()
