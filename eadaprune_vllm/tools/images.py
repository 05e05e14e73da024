"""Images at paths and URLs, read without vLLM."""

import base64
import io
import mimetypes
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from PIL import Image, ImageOps

_SECONDS = 60  # timeout of connecting, and of each read


def is_url(where: str) -> bool:
    """Whether this is a URL, not a path."""
    return where.startswith(("http://", "https://", "file://", "data:"))


def read(where: str) -> bytes:
    """The content of the image file at a path or URL.

    Raises:
        OSError: if there is no such file.
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


def picture(file: bytes) -> Image.Image:
    """The picture in an image file, upright, in RGB.

    Raises:
        OSError: if it is not an image.
    """
    return ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
