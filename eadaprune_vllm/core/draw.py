"""Pictures of the kept patches."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION = 26  # pixels
_GAP = 8
_MAX_PANELS = 32
_LONGEST = 1024  # pixels of a single panel's longest side; several panels together have about as many pixels


def preprocessed(image_processor: Any, image: Image.Image) -> Image.Image:
    """The image that the vision tower gets: resized and cropped by transformers' ``image_processor``."""
    pixels = image_processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def dim_pruned(
    background: Callable[[int], Image.Image], kept: Sequence[int], grids: Sequence[tuple[int, int]]
) -> Image.Image:
    """Draw pruned patches dark and grey, one panel per grid, side by side. Of too many grids every n-th is drawn. Large
    pictures are shrunk to about a megapixel in all.

    Args:
        background: the picture under a grid, by the grid's number.
        kept: indices of the kept tokens. Tokens fill the grids one after the other.
        grids: height and width of each grid, in tokens.
    """
    sizes = [height * width for height, width in grids]
    keep = np.zeros(sum(sizes), dtype=np.uint8)
    keep[list(kept)] = 255
    shown = min(len(grids), _MAX_PANELS)
    dimmed: list[Image.Image] = []
    whole: Image.Image | None = None
    for number in (len(grids) * place // shown for place in range(shown)):
        if (behind := background(number)) is not whole:  # all grids may share one large picture
            whole, picture = behind, _shrunk(behind, int(_LONGEST / shown**0.5))
        first = sum(sizes[:number])
        mask = Image.fromarray(keep[first : first + sizes[number]].reshape(grids[number]))
        grey = picture.convert("L").point(lambda level: level * 0.3).convert("RGB")
        dimmed.append(Image.composite(picture, grey, mask.resize(picture.size, Image.Resampling.NEAREST)))
    return dimmed[0] if shown == 1 else row([("", picture) for picture in dimmed])


def _shrunk(picture: Image.Image, longest: int) -> Image.Image:
    """An RGB copy with sides of at most ``longest`` pixels, made without a full-size copy."""
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
    """The picture as a ``data:`` URL, as in OpenAI's API."""
    file = png(picture) if kind == "png" else jpeg(picture)
    return f"data:image/{kind};base64," + base64.b64encode(file).decode()


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(picture: Image.Image) -> bytes:
    """The picture as a JPEG file: smaller and faster than PNG, and without subsampling, which would blur patches."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", subsampling=0)
    return buffer.getvalue()


def picture(url: str) -> Image.Image:
    """The picture in a ``data:`` URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
