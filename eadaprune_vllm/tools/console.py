"""What commands have in common: errors in one sentence, warnings, output files, flags."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from eadaprune_vllm.core.words import in_words
from eadaprune_vllm.errors import EAdaPruneError

_SHOWN = 10  # images that were skipped


@contextmanager
def refused() -> Iterator[None]:
    """Context manager: errors of the user end the command with one sentence."""
    try:
        yield
    except (ValueError, OSError, EAdaPruneError) as error:
        raise typer.BadParameter(in_words(error)) from None


def check_outputs(force: bool, *files: Path) -> None:
    """Refuse to overwrite files unless ``force``, and make their folders. Before the work, so that none is lost.

    Raises:
        typer.BadParameter: if there is such a file, or its folder cannot be made.
    """
    for file in files:
        if file.is_dir():
            raise typer.BadParameter(f"{file} is a folder")
        with refused():
            file.parent.mkdir(parents=True, exist_ok=True)
    existing = [str(file) for file in files if file.exists()]
    if existing and not force:
        raise typer.BadParameter(f"{' and '.join(existing)} would be overwritten; --force does so")


def warn(what: str, why: str) -> None:
    """Print a warning to stderr."""
    Console(stderr=True).print(f"[yellow]{escape(what)}[/]: {escape(why)}", highlight=False)


def warn_of_skipped(skipped: dict[str, str]) -> None:
    """Print the first of the images that were skipped, each with the reason, and how many more there are."""
    for where, reason in [*skipped.items()][:_SHOWN]:
        warn(f"skipped {where}", reason)
    if len(skipped) > _SHOWN:
        warn("skipped", f"{len(skipped) - _SHOWN} more images")


def flags(**values: object) -> str:
    """The values as flags of a command line; None is left out."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)
