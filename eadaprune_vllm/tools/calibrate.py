"""Finds images, and keeps their spectra in a file."""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.words import in_words
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
                where = _named(line)
                if where is None:
                    raise ValueError(f"{path}:{number}: neither a string nor an object with 'image' or 'url', in JSON")
                yield where if is_url(where) else str(path.parent / where)
        else:
            yield str(path)


def _named(line: str) -> str | None:
    """The path or URL in a line of a JSONL file."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    where = entry.get("image") or entry.get("url") if isinstance(entry, dict) else entry
    return where if isinstance(where, str) else None


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
        ValueError: if the store is of another model or scope.
        EAdaPruneError: if the examiner fails for a reason that is not an image.
    """
    known = _stored(store, examiner.about | {"scope": scope})
    # The selector does not matter here; this one is the fastest.
    given = {"scope": scope, "selector": "uniform"}
    found = {where: identity for where in images if (identity := _identity(where))}
    skipped = {where: "there is no such file" for where in images if where not in found}
    missing = [where for where, identity in found.items() if identity not in known]
    with store.open("a") as file:
        for where in track(missing, "Encoding", console=Console(stderr=True)):
            try:
                spectrum = examiner.examine(read(where), given, spectrum=True).spectrum
            except EAdaPruneError:
                raise
            except Exception as error:  # a bad image is skipped
                skipped[where] = in_words(error).partition("\n")[0].removeprefix(f"{where}: ")
                continue
            assert spectrum, "it was requested"
            known[found[where]] = spectrum
            line = {"image": where, "identity": found[where], "thresholds": spectrum}
            file.write(json.dumps(line) + "\n")
            file.flush()
    curves = [Curve(where, np.array(known[identity])) for where, identity in found.items() if identity in known]
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
