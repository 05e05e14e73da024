"""Make the reference pictures again:  python benchmarks/reference/pictures.py [--output FOLDER]

Photographs come with scikit-image. Everything else is drawn here and is the same in every run. Writes one file for each
picture, ``<kind>-<name>``, to ``eadaprune_vllm/reference``, whose README says what the pictures are for.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import typer
from drawing import noisy
from matplotlib.figure import Figure
from pages import columns, invoice, letter, receipt
from PIL import Image
from screens import desktop, terminal

import eadaprune_vllm.reference

FOLDER = Path(eadaprune_vllm.reference.__file__).parent
CHART, SURFACE = (800, 600), (640, 480)


def photograph(name: str) -> Image.Image:
    """One of scikit-image's, of at most 640 pixels a side."""
    picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    picture.thumbnail((640, 640))
    return picture


def chart(draw: Callable[[Figure], None]) -> Image.Image:
    figure = Figure(figsize=(CHART[0] / 100, CHART[1] / 100), dpi=100, layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi="figure")
    return Image.open(file).convert("RGB")


def lines(figure: Figure) -> None:
    axes, hours = figure.subplots(), np.linspace(0, 24, 97)
    random = np.random.default_rng(0)
    for name, mean, peak in (("photographs", 210, 14), ("pages", 480, 10), ("screens", 120, 16), ("charts", 90, 19)):
        curve = mean * (1 + 0.35 * np.exp(-((hours - peak) ** 2) / 18)) + random.normal(0, 0.02 * mean, hours.size)
        axes.plot(hours, curve, label=name)
    axes.set(title="Tokens kept per image over a day", xlabel="hour", ylabel="tokens", xlim=(0, 24), ylim=(0, None))
    axes.grid(alpha=0.4)
    axes.legend()


def bars(figure: Figure) -> None:
    axes, towns = figure.subplots(), ("Arden", "Birch", "Colne", "Dale", "Elm")
    values = np.random.default_rng(1).uniform(12, 60, (3, len(towns)))
    for number, (year, row) in enumerate(zip(("2021", "2022", "2023"), values, strict=True)):
        drawn = axes.bar(np.arange(len(towns)) + 0.27 * (number - 1), row, 0.25, label=year)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(towns)), towns)
    axes.set(title="Visitors of five libraries", ylabel="thousands", ylim=(0, 70))
    axes.legend(ncols=3)


def scatter(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    random, kinds = np.random.default_rng(2), ("oak", "beech", "pine", "ash")
    for number, name in enumerate(kinds):
        girth = random.normal(60 + 35 * number, 12, 45)
        left.scatter(girth, 4 + 0.13 * girth + random.normal(0, 1.6, 45), s=24, alpha=0.7, label=name)
    left.set(title="Trees of the park", xlabel="girth (cm)", ylabel="height (m)")
    left.legend()
    right.pie((38, 27, 21, 14), labels=kinds, autopct="%d%%")
    right.set(title="Share of each kind")


def wall() -> Image.Image:
    """Plaster of one colour, lit from the upper left."""
    y, x = np.mgrid[0:1:480j, 0:1:640j]
    light = 1.04 - 0.14 * np.hypot(x - 0.2, y - 0.1)
    return noisy(light[..., None] * np.array([214, 205, 188]), 3, 8)


def sky() -> Image.Image:
    """Deep blue above, pale at the horizon."""
    height = np.linspace(0, 1, SURFACE[1])[:, None, None] ** 1.3
    shade = (1 - height) * np.array([62, 118, 196]) + height * np.array([204, 224, 240])
    return noisy(np.repeat(shade, SURFACE[0], 1), 1.2, 9)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    **{f"photograph-{n}.jpg": partial(photograph, n) for n in ("astronaut", "camera", "chelsea", "coffee", "rocket")},
    "page-columns.png": columns,
    "page-letter.png": letter,
    "page-invoice.png": invoice,
    "page-receipt.jpg": receipt,
    "chart-lines.png": partial(chart, lines),
    "chart-bars.png": partial(chart, bars),
    "chart-scatter.png": partial(chart, scatter),
    "screen-desktop.png": desktop,
    "screen-terminal.png": terminal,
    "surface-wall.jpg": wall,
    "surface-sky.jpg": sky,
}


def main(output: Annotated[Path, typer.Option(help="Folder that takes the pictures.")] = FOLDER) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        if name.endswith(".png"):  # drawn ones have few colours
            make().quantize(dither=Image.Dither.NONE).save(output / name, optimize=True)
        else:
            make().save(output / name, quality=85, optimize=True)
    print(f"{len(PICTURES)} pictures, {sum((output / name).stat().st_size for name in PICTURES) / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
