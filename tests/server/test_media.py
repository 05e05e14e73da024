"""Pictures on their way in: what vLLM makes of them, and refuses, holds for requests and previews alike."""

import base64
import io
from typing import Any

import pytest
from harness import MAX_DECODED, Server, content
from PIL import Image
from shared import Reference, noise
from vllm import envs
from vllm.multimodal.image import convert_image_mode

ENERGY = {"energy": 0.9}


def chat(url: str) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
        "eadaprune": ENERGY,
        "max_tokens": 1,
    }


def test_transparency_by_colour(pruning: Server, reference: Reference) -> None:
    """Newer releases of vLLM put the background instead of that colour, older ones do not."""
    picture = noise(5, blocks=12)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=picture.getpixel((0, 0)))
    seen = convert_image_mode(Image.open(buffer), "RGB")
    kept = len(reference.kept(seen, **ENERGY))
    body = chat(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    for path in ("/v1/chat/completions", "/v1/eadaprune/preview"):
        report = pruning.post(path, body)
        assert (report.json().get("eadaprune") or report.json())["kept_tokens"] == kept


@pytest.mark.skipif(not hasattr(envs, "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"), reason="vLLM 0.33 introduced this limit")
def test_the_limit_of_decoded_pictures(pruning: Server) -> None:
    (part,) = content(Image.new("RGB", (2400, 2400)))
    for path in ("/v1/chat/completions", "/v1/eadaprune/preview"):
        response = pruning.post(path, chat(part["image_url"]["url"]))
        assert response.status_code == 400
        assert f"VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES={MAX_DECODED}" in response.json()["error"]["message"]
