"""The reference pictures: a small, fixed mixture of what people send, the same wherever the package is installed."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """The kind of each (``photograph``, ``page``, ``chart``, ``screen`` or ``surface``) and the picture, in RGB, in the
    order of the names of their files."""
    files = (file for file in Path(__file__).parent.iterdir() if file.suffix in (".jpg", ".png"))
    for file in sorted(files, key=lambda file: file.name):
        with Image.open(file) as picture:
            yield file.name.partition("-")[0], picture.convert("RGB")
