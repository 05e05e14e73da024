"""Images at paths and URLs, read without vLLM."""

import base64
import io
import mimetypes
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from PIL import Image, ImageOps

from eadaprune_vllm.core.words import in_words

_SECONDS = 60  # timeout of connecting, and of each read


def is_url(where: str) -> bool:
    """Whether this is a URL, not a path."""
    return where.startswith(("http://", "https://", "file://", "data:"))


def read(where: str) -> bytes:
    """The content of the image file at a path or URL.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the URL cannot be fetched.
    """
    if where.startswith("data:"):
        return base64.b64decode(where.partition(",")[2], validate=True)
    if where.startswith("file:"):
        return Path(unquote(urlsplit(where).path)).read_bytes()
    if not is_url(where):
        return Path(where).read_bytes()
    try:
        return httpx.get(where, follow_redirects=True, timeout=_SECONDS).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{where}: {str(error).partition(chr(10))[0] or type(error).__name__}") from None


def data_url(file: bytes, name: str = "") -> str:
    """An image file as a ``data:`` URL. Its media type is guessed from its name."""
    kind = mimetypes.guess_type(name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def picture(file: bytes, where: str) -> Image.Image:
    """The picture in an image file, upright, in RGB.

    Args:
        file: content of the file.
        where: its path or URL, for the error.

    Raises:
        ValueError: if it is not an image.
    """
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    except Exception as error:  # of several kinds, by format
        raise ValueError(f"{where}: {in_words(error)}") from None


def check(where: str) -> None:
    """Look at the beginning of the image file at a path.

    Raises:
        ValueError: if it cannot be read, or is not an image.
    """
    try:
        with Path(where).open("rb") as file:
            Image.open(file).close()
    except Exception as error:
        raise ValueError(f"{where}: {in_words(error).removeprefix(f'{where}: ')}") from None
