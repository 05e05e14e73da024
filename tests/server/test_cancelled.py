"""Requests that never reach the engine leave nothing behind: the next one with the same image is served."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from harness import Server, content
from PIL import Image
from shared import noise

Body = dict[str, Any]


def chat(*images: Image.Image, **extra: Any) -> Body:
    messages = [{"role": "user", "content": content(*images, "What is it?")}]
    return {"model": "demo", "messages": messages, "max_tokens": 1, **extra}


@pytest.mark.parametrize(
    ("seed", "refused"),
    [
        (4000, {"logprobs": True, "top_logprobs": 20_000}),
        (4001, {"structured_outputs": {"regex": "("}}),
        (4002, {"logit_bias": {"1000000000": 1}}),
    ],
)
def test_image_works_after_a_rejected_request(pruning: Server, seed: int, refused: Body) -> None:
    """What vLLM refuses once it has processed the images."""
    assert pruning.post("/v1/chat/completions", chat(noise(seed), **refused)).status_code == 400
    assert pruning.post("/v1/chat/completions", chat(noise(seed))).status_code == 200


def test_image_works_after_many_cancelled_requests(pruning: Server) -> None:
    """Each at another moment, and retried at once, while others do the same."""
    draw, patience = random.Random(0), 1.0  # seconds; as long as makes about half of them give up

    def give_up(number: int, seconds: float) -> bool:
        body = chat(noise(5000 + number))
        try:
            httpx.post(f"{pruning.url}/v1/chat/completions", json=body, timeout=seconds)
            gave_up = False
        except httpx.TimeoutException:
            gave_up = True
        response = pruning.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return gave_up

    total = number = 0
    with ThreadPoolExecutor(4) as pool:
        while total < 40:
            moments = [draw.uniform(0, patience) for _ in range(4)]
            gave_up = sum(pool.map(give_up, range(number, number + 4), moments))
            number, total, patience = number + 4, total + gave_up, patience * (0.8 + 0.1 * gave_up)
    pruning.wait_until_idle()
