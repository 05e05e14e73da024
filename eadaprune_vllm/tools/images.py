"""Images at paths and URLs, read without vLLM."""

import base64
import io
import mimetypes
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from PIL import Image, ImageOps

_SECONDS = 60  # that a host has for each part of its answer


def is_url(where: str) -> bool:
    """Whether this is a URL, and not the path of a file."""
    return where.startswith(("http://", "https://", "file://", "data:"))


def read(where: str) -> bytes:
    """The image file at a path or URL, as it is.

    Raises:
        OSError: if there is no such file.
        ValueError: if the URL leads to none.
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
    """An image file in a ``data:`` URL: a server need not be able to read it. Its kind is guessed from its name."""
    kind = mimetypes.guess_type(name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def picture(file: bytes) -> Image.Image:
    """The picture in an image file, upright, in RGB.

    Raises:
        OSError: if it holds none.
    """
    return ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
