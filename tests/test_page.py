"""How the page at ``/eadaprune`` is served; what it does is for a browser to say."""

import re
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.http.page import FILES, PATH
from eadaprune_vllm.http.plugin import EndpointPlugin


def client(root_path: str = "", *, page: bool = True) -> TestClient:
    """Of a server with these options."""
    app = FastAPI(root_path=root_path)
    EndpointPlugin().attach_router(app)
    app.state.eadaprune = SimpleNamespace(server_options=ServerOptions(page=page))
    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (PATH, "text/html; charset=utf-8"),
        (f"{PATH}/page.css", "text/css; charset=utf-8"),
        (f"{PATH}/page.js", "text/javascript; charset=utf-8"),
        (f"{PATH}/photograph-coffee.jpg", "image/jpeg"),
    ],
)
def test_nothing_may_be_added_to_the_page(path: str, kind: str) -> None:
    response = client().get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"


TEXTS = {name: file.read_text() for name, file in FILES.items() if file.parent.name == "static"}


def test_the_page_names_nobody_else_and_no_path_from_the_root() -> None:
    for text in TEXTS.values():
        assert {*re.findall(r"https?://[^\"' ]+", text)} <= {"http://www.w3.org/2000/svg"}
        assert not re.findall(r"[\"'`(]/(?:v1|eadaprune)", text)


def test_all_that_the_page_names_is_served() -> None:
    named = set(re.findall(r"eadaprune/([\w.-]+)\"", TEXTS["page.html"]))
    named |= {name for text in TEXTS.values() for name in re.findall(r"from \"\./([\w.]+)\"", text)}
    named |= set(re.findall(r"\w+-\w+\.(?:jpg|png)", TEXTS["page.js"]))
    assert len(named) > 10
    assert named <= FILES.keys()
    assert TEXTS.keys() <= {"page.html"} | named


@pytest.mark.parametrize("name", ["page.py", "..%2Fpage.py", "nothing"])
def test_no_other_file_is_served(name: str) -> None:
    assert client().get(f"{PATH}/{name}").status_code == 404


@pytest.mark.parametrize("root_path", ["", "/proxied"])
def test_the_page_is_found_under_a_root_path(root_path: str) -> None:
    served = client(root_path)
    assert served.get(PATH).status_code == 200
    slash = served.get(f"{PATH}/", follow_redirects=False)
    assert slash.headers["location"] == f"..{PATH}"  # whatever the browser's own path to it


def test_the_page_can_be_switched_off() -> None:
    for path in (PATH, f"{PATH}/page.js"):
        assert client(page=False).get(path).status_code == 404
