"""Pictures of what pruning keeps."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION = 26  # pixels
_GAP = 8
_MOST_VIEWS = 32
_LARGEST, _LARGEST_OF_SEVERAL = (1024, 1024), (384, 384)


def seen(image_processor: Any, image: Image.Image) -> Image.Image:
    """The image as the vision tower sees it: resized and cropped by transformers' ``image_processor``."""
    pixels = image_processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def dim_pruned(
    view: Callable[[int], Image.Image], kept: Sequence[int], grids: Sequence[tuple[int, int]]
) -> Image.Image:
    """What is looked at with its pruned patches dark and grey. Views are side by side if there are several, at equal
    distances if there are too many, and small if they are large.

    Args:
        view: what the grid of that number lies over.
        kept: indices of the kept tokens, which fill the grids one after the other.
        grids: height and width of each grid.
    """
    sizes = [height * width for height, width in grids]
    keep = np.zeros(sum(sizes), dtype=np.uint8)
    keep[list(kept)] = 255
    shown = min(len(grids), _MOST_VIEWS)
    dimmed = []
    for number in (len(grids) * place // shown for place in range(shown)):
        picture, first = view(number).convert("RGB"), sum(sizes[:number])
        picture.thumbnail(_LARGEST if shown == 1 else _LARGEST_OF_SEVERAL)
        mask = Image.fromarray(keep[first : first + sizes[number]].reshape(grids[number]))
        grey = picture.convert("L").point(lambda level: level * 0.3).convert("RGB")
        dimmed.append(Image.composite(picture, grey, mask.resize(picture.size, Image.Resampling.NEAREST)))
    return dimmed[0] if shown == 1 else row([("", picture) for picture in dimmed])


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


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG in a ``data:`` URL, as OpenAI's API takes them."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture(url: str) -> Image.Image:
    """The picture in a ``data:`` URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
