"""How the page at ``/eadaprune`` is served; what it does is for a browser to say."""

import re
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.http.page import PAGE, PATH
from eadaprune_vllm.http.plugin import EndpointPlugin


def client(root_path: str = "", *, page: bool = True) -> TestClient:
    """Of a server with these options."""
    app = FastAPI(root_path=root_path)
    EndpointPlugin().attach_router(app)
    app.state.eadaprune = SimpleNamespace(server_options=ServerOptions(page=page))
    return TestClient(app)


def test_the_page_is_one_file_that_nothing_may_be_added_to() -> None:
    response = client().get(PATH)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert (policy["img-src"], policy["connect-src"]) == ("data:", "'self'")
    assert response.text == PAGE


def test_the_page_names_nobody_else_and_no_path_from_the_root() -> None:
    named = re.findall(r"https?://[^\"' ]+", PAGE)
    assert set(named) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"[\"'`(]/(?:v1|eadaprune)", PAGE)


@pytest.mark.parametrize("root_path", ["", "/proxied"])
def test_the_page_is_found_under_a_root_path(root_path: str) -> None:
    served = client(root_path)
    assert served.get(PATH).status_code == 200
    slash = served.get(f"{PATH}/", follow_redirects=False)
    assert slash.headers["location"] == f"..{PATH}"  # whatever the browser's own path to it


def test_the_page_can_be_switched_off() -> None:
    assert client(page=False).get(PATH).status_code == 404
