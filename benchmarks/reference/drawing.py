"""Fonts, colours and noise of the drawn reference pictures."""

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

INK, GREY = "#202020", "#707070"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


def monospaced(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's, laid out as Pillow's own, whatever libraries Pillow was built with."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def noisy(pixels: NDArray[np.float64], strength: float, seed: int) -> Image.Image:
    """With the noise of a sensor on ``[height, width, 3]``."""
    noise = np.random.default_rng(seed).normal(0, strength, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
