"""A server that the commands can ask, without vLLM."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.core.options import Budget
from eadaprune_vllm.core.report import ItemPreview, Preview
from eadaprune_vllm.core.server_info import Config, Reference
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.tools import images

SPECTRUM = np.arange(100) / 100  # of every image that it is asked about


class Stub(ThreadingHTTPServer):
    """Answers as a server with the plugin does; every image has the same spectrum there.

    Attributes:
        failing: status and body that every route answers with instead.
        prunes: whether it has the plugin.
        refuses: body of the 400 that previews are answered with instead.
        asked: bodies of previews.
        ends_after: how many previews it answers; the connection of the next is closed. None for all.
        budget: the operator's option.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failing: tuple[int, str] | None = None
        self.prunes = True
        self.refuses: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.ends_after: int | None = None
        self.budget: Budget = "spectrum"
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def config(self) -> str:
        about = {"version": "1", "vllm_version": "1", "models": ["served"], "architecture": "A", "dtype": "float32"}
        options = ServerOptions(min_tokens=4, min_share=0, energy_ceiling=0.999, budget=self.budget)
        options = options.with_curves([Curve("page", SPECTRUM)])
        redacted = {
            "configured": options,
            "effective": options.resolve(),
            "reference": Reference.of(options),
            "selectors": [],
            "endpoints": [],
        }
        return Config.model_validate(about | redacted).model_dump_json()

    @property
    def images(self) -> list[bytes]:
        """Files that were sent."""
        return [images.read(body["messages"][0]["content"][0]["image_url"]["url"]) for body in self.asked]

    def preview(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body)
        if self.refuses:
            return 400, self.refuses
        if self.images[-1] == b"no image":
            return 400, '{"error": {"message": "Failed to load image: this is none, namely <_io.BytesIO object>"}}'
        item = ItemPreview(
            visual_tokens=100,
            kept_tokens=40,
            energy_threshold=body["eadaprune"].get("energy", 0.99),
            energy_requested=0.99,
            spectral_energy=None if self.budget == "span" else 0.99,
            span_energy=None,
            selector="span",
            curve=[(1, 0.5), (100, 1.0)],
            spectrum=SPECTRUM.tolist() if body["spectrum"] else None,
            overlay=data_url(Image.new("RGB", (8, 8))) if body["overlay"] else None,
        )
        whole = {"visual_tokens": 100, "kept_tokens": 40, "tokens_saved": 60, "kv_cache_bytes_saved": 0, "seconds": 0}
        return 200, Preview.model_validate({"images": [item], "videos": []} | whole).model_dump_json()


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer mine":
            self.answer(401, '{"error": "Unauthorized"}')
        elif self.path == "/v1/models":
            self.answer(200, '{"data": [{"id": "served"}]}')
        elif self.path == "/v1/eadaprune/config" and self.server.prunes:
            self.answer(200, self.server.config)
        else:
            self.answer(404, '{"detail": "Not Found"}')

    def do_POST(self) -> None:
        assert self.path in ("/v1/eadaprune/preview", "/v1/chat/completions")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.ends_after != len(self.server.asked):
            self.answer(*self.server.preview(body))

    def answer(self, status: int, text: str) -> None:
        status, text = self.server.failing or (status, text)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass
