"""The page ``/eadaprune``, which shows in a browser what pruning keeps of a picture. It calls our other endpoints."""

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, RedirectResponse

from eadaprune_vllm import reference

PATH = "/eadaprune"
_FOLDERS = (Path(__file__).parent / "static", Path(reference.__file__).parent)
# By name: the page, its style and scripts, and sample pictures.
FILES = {
    file.name: file
    for folder in _FOLDERS
    for file in sorted(folder.iterdir())
    if file.suffix in (".html", ".css", ".js", ".jpg", ".png")
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the page of another release may not fit these endpoints
}

router = APIRouter(include_in_schema=False)


@router.get(f"{PATH}/")
async def slash() -> RedirectResponse:
    """Redirect to the page. FastAPI's own redirect drops a path prefix that a proxy strips."""
    return RedirectResponse(f"..{PATH}")


@router.get(PATH)
@router.get(f"{PATH}/{{name}}")
async def file(request: Request, name: str = "page.html") -> FileResponse:
    """A file of the page. It has no data of the server: it calls endpoints, with the API key if there is one."""
    if name not in FILES or not request.app.state.eadaprune.server_options.page:
        raise HTTPException(404)
    return FileResponse(FILES[name], headers=_HEADERS)
