"""The reference pictures: what comes with the package, and that the script still makes it."""

from collections import Counter
from pathlib import Path

import numpy as np
from pictures import FOLDER, PICTURES, main
from PIL import Image

from eadaprune_vllm.reference import pictures


def coarse(picture: Image.Image) -> np.ndarray:
    """The mean of every 8 x 8 pixels: letters may be a pixel off."""
    return np.asarray(picture.convert("RGB").reduce(8), dtype=float)


def test_pictures_are_of_all_kinds_and_of_usual_sizes() -> None:
    found = list(pictures())
    kinds = Counter(kind for kind, _ in found)
    assert kinds == {"photograph": 5, "page": 4, "chart": 3, "screen": 2, "surface": 2}
    assert {picture.mode for _, picture in found} == {"RGB"}
    assert all(min(picture.size) >= 300 and max(picture.size) <= 1024 for _, picture in found)
    assert all(max(picture.size) <= 640 for kind, picture in found if kind == "photograph")
    assert sum((FOLDER / name).stat().st_size for name in PICTURES) < 600_000


def test_pictures_come_in_the_order_of_their_names() -> None:
    first, again = list(pictures()), list(pictures())
    assert [kind for kind, _ in first] == [name.partition("-")[0] for name in sorted(PICTURES)]
    for (_, picture), (_, other), name in zip(first, again, sorted(PICTURES), strict=True):
        assert picture.tobytes() == other.tobytes() == Image.open(FOLDER / name).convert("RGB").tobytes()


def test_script_makes_the_pictures_of_the_package(tmp_path: Path) -> None:
    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FOLDER.glob("*-*")} == set(PICTURES)
    for name in PICTURES:
        made, held = Image.open(tmp_path / name), Image.open(FOLDER / name)
        assert made.size == held.size
        # Other releases of matplotlib, Pillow and libjpeg draw and compress a little differently.
        assert np.abs(coarse(made) - coarse(held)).mean() < 4, name
