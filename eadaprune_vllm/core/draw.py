"""Pictures of what pruning keeps."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION = 26  # pixels
_GAP = 8
_MOST_VIEWS = 32
_LONGEST = 1024  # pixels of the only view; several have as many pixels together


def seen(image_processor: Any, image: Image.Image) -> Image.Image:
    """The image as the vision tower sees it: resized and cropped by transformers' ``image_processor``."""
    pixels = image_processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def dim_pruned(
    view: Callable[[int], Image.Image], kept: Sequence[int], grids: Sequence[tuple[int, int]]
) -> Image.Image:
    """Views with their pruned patches dark and grey: side by side if there are several, at equal distances if there are
    too many, and shrunk to about a megapixel together if they are larger.

    Args:
        view: what the grid of that number lies over.
        kept: indices of the kept tokens, which fill the grids one after the other.
        grids: height and width of each grid.
    """
    sizes = [height * width for height, width in grids]
    keep = np.zeros(sum(sizes), dtype=np.uint8)
    keep[list(kept)] = 255
    shown = min(len(grids), _MOST_VIEWS)
    dimmed: list[Image.Image] = []
    whole: Image.Image | None = None
    for number in (len(grids) * place // shown for place in range(shown)):
        if (behind := view(number)) is not whole:  # a large one may be behind every grid
            whole, picture = behind, _shrunk(behind, int(_LONGEST / shown**0.5))
        first = sum(sizes[:number])
        mask = Image.fromarray(keep[first : first + sizes[number]].reshape(grids[number]))
        grey = picture.convert("L").point(lambda level: level * 0.3).convert("RGB")
        dimmed.append(Image.composite(picture, grey, mask.resize(picture.size, Image.Resampling.NEAREST)))
    return dimmed[0] if shown == 1 else row([("", picture) for picture in dimmed])


def _shrunk(picture: Image.Image, longest: int) -> Image.Image:
    """An RGB copy whose sides are at most so long, made without a copy of the whole."""
    scale = min(longest / max(picture.size), 1)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return picture.resize((width, height), reducing_gap=2).convert("RGB")


def row(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Captioned pictures side by side on white."""
    width = sum(picture.width + _GAP for _, picture in panels) + _GAP
    height = max(picture.height for _, picture in panels) + _CAPTION + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(15), _GAP
    for caption, picture in panels:
        pen.text((x, 4), caption, "black", font)
        sheet.paste(picture, (x, _CAPTION))
        x += picture.width + _GAP
    return sheet


def data_url(picture: Image.Image, kind: Literal["png", "jpeg"] = "png") -> str:
    """The picture as a file of that kind in a ``data:`` URL, as OpenAI's API takes them."""
    file = png(picture) if kind == "png" else jpeg(picture)
    return f"data:image/{kind};base64," + base64.b64encode(file).decode()


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(picture: Image.Image) -> bytes:
    """The picture as a JPEG file, a fraction of a PNG's size and time; edges of patches stay sharp in colour."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", subsampling=0)
    return buffer.getvalue()


def picture(url: str) -> Image.Image:
    """The picture in a ``data:`` URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
