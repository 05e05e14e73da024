"""Generated scenes, about which the embedded model is trained and measured to answer questions.

A scene is a background, blank or textured or a photograph, and one to thirty things on it: coloured shapes, real
handwritten digits (scikit-learn's), and words. Everything about it follows from its seed. Handwriting is split: digits
of training scenes are never seen in those of held-out ones.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

SIDE = 336
COLOURS = {
    "red": (214, 30, 36),
    "green": (28, 150, 52),
    "blue": (36, 70, 220),
    "yellow": (240, 205, 20),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# fmt: off
WORDS = (
    "apple", "bank", "boat", "cafe", "exit", "farm", "fish", "gold", "hotel", "jazz", "king", "lamp", "milk", "moon",
    "north", "open", "park", "pizza", "queen", "rain", "sale", "shop", "snow", "stop", "taxi", "tree", "tuna", "vase",
    "wolf", "zero",
)
# fmt: on
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
DENSITIES = {"sparse": (1, 3), "medium": (4, 9), "dense": (10, 18), "crowded": (19, 30)}  # how many things
_DIGITS, _TRAINING_DIGITS = 1797, 1497  # the last ones are held out
_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
_TEXTURES = ("brick", "grass", "gravel")
_CLEAR = 10  # pixels from the border of a place within which no question asks for it


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        kind: ``shape``, ``digit`` or ``word``.
        name: one of ``SHAPES``, ``0`` to ``9``, or one of ``WORDS``.
        colour: one of ``COLOURS``.
        box: left, top, right and bottom, in pixels.
    """

    kind: str
    name: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str | None:
        """Where its centre is, one of ``PLACES``; None where that is hard to say."""
        found = []
        for centre in ((self.box[1] + self.box[3]) / 2, (self.box[0] + self.box[2]) / 2):
            if any(abs(centre - border) < _CLEAR for border in (SIDE / 3, SIDE * 2 / 3)):
                return None
            found.append(min(int(centre * 3 / SIDE), 2))
        return PLACES[found[0]][found[1]]


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    density: str
    things: tuple[Thing, ...]


def make_scene(seed: int, held_out: bool, within: tuple[int, int, int, int] = (0, 0, SIDE, SIDE)) -> Scene:
    """Args:
    seed: scenes of one seed, held out or not, have nothing in common but chance.
    held_out: whether it is for measuring.
    within: left, top, right and bottom of what there is of it, in pixels; the smaller, the fewer things.
    """
    random = np.random.default_rng((seed, held_out))
    density = str(random.choice(list(DENSITIES)))
    low, high = DENSITIES[density]
    share = (within[2] - within[0]) * (within[3] - within[1]) / SIDE**2
    count = int(random.integers(low, high + 1))
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste(_background(random, within), within[:2])
    largest = min(80.0, 250 / math.sqrt(count))
    count = max(1, round(count * share))
    things: list[Thing] = []
    # The largest need the most room: words are placed first.
    kinds = sorted(random.choice(["shape", "digit", "word"], count, p=[0.5, 0.27, 0.23]), key="word digit shape".find)
    for kind in kinds:
        colour = str(random.choice(list(COLOURS)))
        height = float(random.uniform(max(22, largest * 0.6), largest))
        if kind == "shape":
            name = str(random.choice(SHAPES))
            mask = _shape(name, round(height))
        elif kind == "digit":
            first, end = (_TRAINING_DIGITS, _DIGITS) if held_out else (0, _TRAINING_DIGITS)
            name, mask = _digit(int(random.integers(first, end)), round(max(height, 30)))
        else:
            name = str(random.choice(WORDS))
            mask = _word(name, round(min(max(height, 26), 44)))
        if box := _free(random, mask.size, within, [thing.box for thing in things]):
            image.paste(COLOURS[colour], box[:2], mask)
            things.append(Thing(kind, name, colour, box))
    return Scene(image, density, tuple(things))


def _free(
    random: np.random.Generator, size: tuple[int, int], within: tuple[int, int, int, int], taken: list[tuple[int, ...]]
) -> tuple[int, int, int, int] | None:
    """A place for something of that size beside all others, if one is found."""
    for _ in range(40):
        left, top = (int(random.integers(within[i] + 4, within[i + 2] - 4 - size[i])) for i in (0, 1))
        right, bottom = left + size[0], top + size[1]
        if all(left >= r + 4 or right <= l - 4 or top >= b + 4 or bottom <= t - 4 for l, t, r, b in taken):  # noqa: E741
            return left, top, right, bottom
    return None


def _background(random: np.random.Generator, within: tuple[int, int, int, int]) -> Image.Image:
    """That part of one. Nothing on it is as colourful as things are."""
    kind = random.choice(["blank", "gradient", "texture", "photo"], p=[0.4, 0.2, 0.2, 0.2])
    base = np.array(random.choice([random.uniform(200, 255), random.uniform(0, 60)])) + random.uniform(-12, 12, 3)
    window = slice(within[1], within[3]), slice(within[0], within[2])
    pixels = np.zeros((SIDE, SIDE, 1), np.float32)[window]
    if kind == "gradient":
        angle, height = random.uniform(0, 2 * math.pi), random.uniform(20, 50)
        ramp = np.linspace(-0.5 * height, 0.5 * height, SIDE, dtype=np.float32)
        pixels = (math.cos(angle) * ramp[window[0], None] + math.sin(angle) * ramp[None, window[1]])[..., None]
    elif kind != "blank":
        source = _picture(str(random.choice(_TEXTURES if kind == "texture" else _PHOTOS)))
        top, left = (int(random.integers(length - SIDE + 1)) for length in source.shape[:2])
        pixels = source[top:, left:][window] * np.float32(random.uniform(0.15, 0.3))  # pale or dark
    return Image.fromarray((pixels + base.astype(np.float32)).clip(0, 255).astype(np.uint8))


@cache
def _picture(name: str) -> NDArray[np.float32]:
    """Greyish, ``[height, width, 3]``, around 0."""
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    scale = max(1.0, SIDE * 1.2 / min(image.size))
    pixels = np.asarray(image.resize((round(image.width * scale), round(image.height * scale))), dtype=np.float32)
    mixed: NDArray[np.float32] = 0.4 * pixels + 0.6 * pixels.mean(-1, keepdims=True) - 128
    return mixed


@cache
def _shape(name: str, size: int) -> Image.Image:
    """A mask, ``size`` pixels high and wide."""
    scale = 4  # drawn larger: Pillow draws without smoothing
    full = size * scale
    mask = Image.new("L", (full, full))
    pen = ImageDraw.Draw(mask)
    centre, third = full / 2, full / 3

    def points(radii: tuple[float, ...], count: int) -> list[tuple[float, float]]:
        angles = (2 * math.pi * i / count - math.pi / 2 for i in range(count))
        return [
            (centre + radii[i % len(radii)] * math.cos(a), centre + radii[i % len(radii)] * math.sin(a))
            for i, a in enumerate(angles)
        ]

    if name == "circle":
        pen.ellipse((0, 0, full - 1, full - 1), fill=255)
    elif name == "ring":
        pen.ellipse((0, 0, full - 1, full - 1), fill=255)
        pen.ellipse((full * 0.25, full * 0.25, full * 0.75, full * 0.75), fill=0)
    elif name == "square":
        pen.rectangle((full * 0.06, full * 0.06, full * 0.94, full * 0.94), fill=255)
    elif name == "triangle":
        pen.polygon([(centre, full * 0.04), (full - 1, full * 0.94), (0, full * 0.94)], fill=255)
    elif name == "star":
        pen.polygon(points((centre, centre * 0.42), 10), fill=255)
    else:
        pen.rectangle((third, 0, 2 * third, full - 1), fill=255)
        pen.rectangle((0, third, full - 1, 2 * third), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


@cache
def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    found = load_digits()
    return found.images, found.target


def _digit(number: int, size: int) -> tuple[str, Image.Image]:
    images, target = _digits()
    mask = Image.fromarray((images[number] * (255 / 16)).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return str(target[number]), mask.point(lambda level: min(255, int(level * 1.4)))


@cache
def _word(text: str, height: int) -> Image.Image:
    font = ImageFont.load_default(height * 0.8)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, stroke_width=1))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font, stroke_width=1)
    return mask.filter(ImageFilter.SMOOTH)
