"""Where commands get decisions about images from: a server, or an engine of their own (``offline``)."""

import os
from functools import cached_property
from typing import Any, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from eadaprune_vllm.core.options import KEY, PruneOptions
from eadaprune_vllm.core.report import ItemPreview, Preview
from eadaprune_vllm.core.server_info import Config
from eadaprune_vllm.core.words import in_words
from eadaprune_vllm.errors import ServerError
from eadaprune_vllm.tools.images import data_url

_INCOMPATIBLE = "an incompatible version of the plugin"
Body = TypeVar("Body", bound=BaseModel)
# Status codes of errors that are about the image.
_IMAGE_ERRORS = (400, 413, 422, 500)
_SECONDS = 600  # an image may be queued behind those of other clients
_SECONDS_TO_CONNECT = 10
_KEY = "OPENAI_API_KEY"


def address(url: str) -> str:
    """The address of a server, from which the base URL of OpenAI's clients differs by ``/v1``."""
    return url.rstrip("/").removesuffix("/v1")


def api_key() -> str:
    return os.environ.get(_KEY) or "none"


def denied(url: str) -> ServerError:
    """The server at ``url`` wants another API key."""
    if os.environ.get(_KEY):
        return ServerError(f"{url}: Unauthorized; the server does not accept the API key in {_KEY}")
    return ServerError(f"{url}: Unauthorized; the server needs an API key, which {_KEY} has to hold")


def nothing_there(url: str) -> ServerError:
    """There is no API of vLLM's at ``url``."""
    return ServerError(
        f"{url}: no vLLM server at this address, as there is no {url}/v1/models (404); "
        "an address is like http://localhost:8000"
    )


class Examiner(Protocol):
    """A source of decisions. Its methods raise EAdaPruneError for errors that are not about an image."""

    @property
    def name(self) -> str:
        """The model's name, for titles."""

    @property
    def about(self) -> dict[str, Any]:
        """What spectra depend on, except for the scope, as JSON. Includes the server's option ``budget``."""

    @property
    def defaults(self) -> PruneOptions:
        """The effective options if none are given."""

    def examine(
        self, image: bytes, given: dict[str, Any], *, spectrum: bool = False, overlay: bool = False
    ) -> ItemPreview:
        """The decision about an image.

        Args:
            image: content of an image file.
            given: pruning options; the others have defaults.
            spectrum: whether to include the whole spectrum.
            overlay: whether to draw what is kept.

        Raises:
            ValueError: if this image cannot be pruned with these options.
        """

    def close(self) -> None:
        """Free what it holds."""


class ServedModel:
    """A model behind a running server with the plugin. The API key is taken from the environment. Methods raise
    ServerError if the server cannot be reached, denies access, or does not prune.

    Args:
        url: of the server.
        seconds: timeout of each response.
    """

    def __init__(self, url: str, seconds: float = _SECONDS) -> None:
        self._url = address(url)
        timeout = httpx.Timeout(seconds, connect=_SECONDS_TO_CONNECT)
        self._client = httpx.Client(headers={"Authorization": f"Bearer {api_key()}"}, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    @cached_property
    def config(self) -> Config:
        """The server's configuration."""
        return self._call(Config, "GET", "config")

    @property
    def name(self) -> str:
        return self.config.models[0]

    @property
    def about(self) -> dict[str, Any]:
        config = self.config
        return config.model_dump(include={"models", "architecture", "dtype"}) | {"budget": config.configured.budget}

    @property
    def defaults(self) -> PruneOptions:
        return self.config.effective

    def examine(
        self, image: bytes, given: dict[str, Any], *, spectrum: bool = False, overlay: bool = False
    ) -> ItemPreview:
        """Raises:
        ValueError: with the server's message, if it rejects the image or the options.
        """
        part = {"type": "image_url", "image_url": {"url": data_url(image)}}
        body = {"messages": [{"role": "user", "content": [part]}], KEY: given, "spectrum": spectrum, "overlay": overlay}
        (found,) = self._call(Preview, "POST", "preview", body).images
        return found

    def _call(self, kind: type[Body], method: str, route: str, body: object = None) -> Body:
        response = self._request(method, f"eadaprune/{route}", body)
        if response.status_code == 404 and self._request("GET", "models").status_code == 404:
            raise nothing_there(self._url)
        if response.status_code == 404:
            raise ServerError(f"{self._url} does not prune: is it running with --plugin eadaprune?")
        if response.status_code == 401:
            raise denied(self._url)
        if response.is_success:
            try:
                return kind.model_validate_json(response.content)
            except ValidationError as error:
                what = "something else than vLLM" if error.errors()[0]["type"] == "json_invalid" else _INCOMPATIBLE
                raise ServerError(f"{self._url} runs {what}") from None
        if body and response.status_code in _IMAGE_ERRORS:
            raise ValueError(_sentence(response))
        raise ServerError(f"{self._url}: {_sentence(response)}")

    def _request(self, method: str, route: str, body: object = None) -> httpx.Response:
        try:
            return self._client.request(method, f"{self._url}/v1/{route}", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self._url}: {in_words(error)}") from None


def _sentence(response: httpx.Response) -> str:
    """The message of a server's error, in vLLM's format or another."""
    try:
        found = response.json()["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
