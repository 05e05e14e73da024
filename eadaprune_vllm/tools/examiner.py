"""Whom the commands ask about images: a server, or an engine of their own (``offline``)."""

import os
from functools import cached_property
from typing import Any, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from eadaprune_vllm.core.options import KEY, PruneOptions
from eadaprune_vllm.core.report import Config, ItemPreview, Preview
from eadaprune_vllm.errors import ServerError
from eadaprune_vllm.tools.images import data_url

Answer = TypeVar("Answer", bound=BaseModel)
# Of the server's refusals, those that are about what was sent to it.
_ABOUT_THE_IMAGE = (400, 413, 422, 500)
_SECONDS = 600  # an image may wait for those of other clients
_SECONDS_TO_CONNECT = 10


class Examiner(Protocol):
    """A model that can be asked what pruning makes of an image. What it says raises EAdaPruneError if it can say
    nothing of any."""

    @property
    def name(self) -> str:
        """For titles."""

    @property
    def about(self) -> dict[str, Any]:
        """What spectra depend on, as JSON, the scope aside; ``budget`` among it, the server's option."""

    @property
    def defaults(self) -> PruneOptions:
        """The options that are in force where none are given."""

    def examine(
        self, image: bytes, given: dict[str, Any], *, spectrum: bool = False, overlay: bool = False
    ) -> ItemPreview:
        """What would become of an image.

        Args:
            image: a file's content.
            given: pruning options, on top of the defaults.
            spectrum: whether to tell the whole spectrum.
            overlay: whether to draw what is kept.

        Raises:
            ValueError: if nothing can be said of this image under these options.
        """

    def close(self) -> None:
        """To be called once nothing more is asked."""


class ServedModel:
    """A model behind a running server that has the plugin. The API key is that of the environment, ``OPENAI_API_KEY``.
    What it says raises ServerError if the server cannot be reached, does not let this client in, or does not prune.

    Args:
        url: of the server.
        seconds: that it has for each answer.
    """

    def __init__(self, url: str, seconds: float = _SECONDS) -> None:
        self._url = url.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY", "none")
        timeout = httpx.Timeout(seconds, connect=_SECONDS_TO_CONNECT)
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    @cached_property
    def config(self) -> Config:
        """What the server says of itself."""
        return self._ask(Config, "GET", "config")

    @property
    def name(self) -> str:
        return self.config.models[0]

    @property
    def about(self) -> dict[str, Any]:
        config = self.config
        return config.model_dump(include={"models", "architecture", "dtype"}) | {"budget": config.options.budget}

    @property
    def defaults(self) -> PruneOptions:
        return self.config.reference.options

    def examine(
        self, image: bytes, given: dict[str, Any], *, spectrum: bool = False, overlay: bool = False
    ) -> ItemPreview:
        """Raises:
        ValueError: in the server's words, if it refuses the image or the options.
        """
        part = {"type": "image_url", "image_url": {"url": data_url(image)}}
        body = {"messages": [{"role": "user", "content": [part]}], KEY: given, "spectrum": spectrum, "overlay": overlay}
        (found,) = self._ask(Preview, "POST", "preview", body).images
        return found

    def _ask(self, kind: type[Answer], method: str, route: str, body: object = None) -> Answer:
        try:
            response = self._client.request(method, f"{self._url}/v1/eadaprune/{route}", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self._url}: {error or type(error).__name__}") from None
        if response.status_code == 404:
            raise ServerError(f"{self._url} does not prune: is it running with --plugin eadaprune?")
        if response.is_success:
            try:
                return kind.model_validate_json(response.content)
            except ValidationError:
                raise ServerError(f"{self._url} does not answer as this version of the plugin does") from None
        if body and response.status_code in _ABOUT_THE_IMAGE:
            raise ValueError(_sentence(response))
        raise ServerError(f"{self._url}: {_sentence(response)}")


def _sentence(response: httpx.Response) -> str:
    """The reason that a server gives, in vLLM's shape or another."""
    try:
        found = response.json()["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
