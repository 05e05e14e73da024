"""The page ``/eadaprune``, which shows in a browser what pruning keeps of a picture. It calls our other endpoints."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse

PATH = "/eadaprune"
PAGE = Path(__file__).with_suffix(".html").read_text("utf-8")


def _digest(tag: str) -> str:
    """The hash of the page's script, or style, for the content security policy."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the page of another release may not fit these endpoints
}

router = APIRouter(include_in_schema=False)


@router.get(PATH)
async def page(request: Request) -> HTMLResponse:
    """The page. It has no data of the server: it calls endpoints, with the API key if there is one."""
    if not request.app.state.eadaprune.server_options.page:
        raise HTTPException(404)
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get(f"{PATH}/")
async def slash() -> RedirectResponse:
    """Redirect to the page. FastAPI's own redirect drops a path prefix that a proxy strips."""
    return RedirectResponse(f"..{PATH}")
