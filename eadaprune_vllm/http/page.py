"""The page at ``/eadaprune``: what pruning keeps of a picture, to look at in a browser. It asks our other routes."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse

PATH = "/eadaprune"
PAGE = Path(__file__).with_suffix(".html").read_text("utf-8")


def _digest(tag: str) -> str:
    """What a browser goes by to tell the page's own script, or style, from any other."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another release's page would ask for what this one does not know
}

router = APIRouter(include_in_schema=False)


@router.get(PATH)
async def page(request: Request) -> HTMLResponse:
    """The page, which holds nothing of the server: what it shows, it asks for, with the API key if there is one."""
    if not request.app.state.eadaprune.server_options.page:
        raise HTTPException(404)
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get(f"{PATH}/")
async def slash() -> RedirectResponse:
    """To the page. FastAPI's own redirect forgets the path that a proxy cut off."""
    return RedirectResponse(f"..{PATH}")
