"""Finds the threshold at which images keep a share of their tokens on average, from spectra that are stored."""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track

from eadaprune_vllm.core.budget import Curve, Targets
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.errors import EAdaPruneError
from eadaprune_vllm.tools.examiner import Examiner
from eadaprune_vllm.tools.images import is_url, read


def find_images(sources: Iterable[str]) -> list[str]:
    """Resolve sources to paths and URLs of images, without duplicates.

    Args:
        sources: image files, folders (searched recursively), glob patterns, URLs, and JSONL files whose lines are
            strings or objects with a key ``image`` or ``url``. Relative paths in such a file are relative to it.

    Raises:
        ValueError: if a source has no image.
    """
    found: list[str] = []
    for source in sources:
        images = list(_images_of(source))
        if not images:
            raise ValueError(f"{source}: no images found")
        found += images
    return list(dict.fromkeys(found))


def _images_of(source: str) -> Iterator[str]:
    if is_url(source):
        yield source
        return
    extensions = Image.registered_extensions()
    for path in sorted(map(Path, glob.glob(source, recursive=True))):
        if path.is_dir():
            yield from (str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in extensions)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                entry = json.loads(line)
                where = entry if isinstance(entry, str) else entry.get("image") or entry.get("url")
                if not isinstance(where, str):
                    raise ValueError(f"{path}:{number}: neither a string nor an object with 'image' or 'url'")
                yield where if is_url(where) else str(path.parent / where)
        else:
            yield str(path)


def encode(examiner: Examiner, images: Sequence[str], store: Path, scope: str) -> tuple[list[Curve], dict[str, str]]:
    """The spectra of all images that can be encoded, from ``store`` or newly encoded and added to it.

    Args:
        examiner: encodes images that are not in the store.
        images: paths or URLs.
        store: a JSONL file. An interrupted run can be continued with it.
        scope: the option ``scope``.

    Returns:
        The spectra, and by image why it was skipped.

    Raises:
        ValueError: if the store is of another model or scope, or no image can be encoded.
        EAdaPruneError: if the examiner fails for a reason that is not an image.
    """
    known = _stored(store, examiner.about | {"scope": scope})
    # The selector does not matter here; this one is the fastest.
    given = {"scope": scope, "selector": "uniform"}
    found = {where: identity for where in images if (identity := _identity(where))}
    skipped = dict.fromkeys(set(images) - found.keys(), "there is no such file")
    missing = [where for where, identity in found.items() if identity not in known]
    with store.open("a") as file:
        for where in track(missing, "Encoding", console=Console(stderr=True)):
            try:
                spectrum = examiner.examine(read(where), given, spectrum=True).spectrum
            except EAdaPruneError:
                raise
            except Exception as error:  # a bad image is skipped
                skipped[where] = str(error).partition("\n")[0] or type(error).__name__
                continue
            assert spectrum, "it was requested"
            known[found[where]] = spectrum
            line = {"image": where, "identity": found[where], "thresholds": spectrum}
            file.write(json.dumps(line) + "\n")
            file.flush()
    curves = [Curve(where, np.array(known[identity])) for where, identity in found.items() if identity in known]
    if not curves:
        raise ValueError(f"none of {len(images)} images could be encoded; the first: {next(iter(skipped.items()))}")
    return curves, skipped


def _stored(store: Path, about: dict[str, Any]) -> dict[str, list[float]]:
    """The stored spectra by identity. Creates the file if there is none; drops an incomplete last line."""
    header = json.dumps(about) + "\n"
    text = store.read_text() if store.exists() else ""
    if not text.startswith(header) and not header.startswith(text):
        first = text.partition("\n")[0][:300]
        raise ValueError(f"choose another --store: {store} begins with {first!r}, and not with {about}")
    complete = text[: text.rfind("\n") + 1] or header
    if complete != text:
        store.write_text(complete)
    entries = map(json.loads, complete.splitlines()[1:])
    return {entry["identity"]: entry["thresholds"] for entry in entries}


def _identity(where: str) -> str | None:
    """Identifies an image; a changed file has another identity. None if there is no such file."""
    if is_url(where):
        return where
    try:
        stat = Path(where).stat()
    except OSError:
        return None
    return f"{where} {stat.st_size} {stat.st_mtime_ns}"


def solve(curves: Sequence[Curve], target: float, options: PruneOptions) -> PruneOptions:
    """The options with the threshold below 1.0 at which the mean share of tokens is closest to ``target``.

    Raises:
        ValueError: if no threshold reaches the target.
    """
    targets = Targets(curves, options)
    if not targets.min_target <= target <= targets.max_target:
        raise ValueError(
            f"thresholds keep {targets.min_target:.3f} to {targets.max_target:.3f} of the tokens of these images on "
            f"average, so target {target:g} is not reachable"
        )
    return options.model_copy(update={"energy": targets.energy(target)})


def histogram(budgets: Sequence[int], title: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(budgets, bins=40, color="tab:blue")
    average = sum(budgets) / len(budgets)
    axes.axvline(average, color="black", linestyle="--", label=f"mean {average:.1f}")
    axes.set_xlabel("tokens an image keeps")
    axes.set_ylabel("images")
    axes.set_title(title, fontsize=10)
    axes.legend()
    return figure
