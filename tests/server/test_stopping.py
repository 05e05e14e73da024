"""A server that is stopped as the manifests stop it: answers that were begun are written to their end."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import DTYPE, Server, content
from openai import APIError
from PIL import Image

MANIFEST = Path(__file__).parents[2] / "deploy/k8s/base/deployment.yaml"
TOKENS = 600  # so many that no signal finds them written
STOPPED_ANSWERS = [(1, "--shutdown-timeout=120", True), (2, "--shutdown-timeout=5", False)]


@pytest.mark.parametrize(("api_servers", "flag", "is_finished"), STOPPED_ANSWERS)
def test_answers_are_finished(
    start: Callable[..., Server], images: dict[str, Image.Image], api_servers: int, flag: str, is_finished: bool
) -> None:
    """With several API servers vLLM cuts them off. Once it does not, the overlays need no other way."""
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--dtype", DTYPE, f"--api-server-count={api_servers}", flag]
    server = start(f"stopped-{api_servers}", *flags)
    stream = server.client.chat.completions.create(
        model=server.NAME,
        messages=[{"role": "user", "content": content(images["coffee"], "What is it?")}],
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": {"include_usage": True}},
    )
    first = next(iter(stream))
    assert first.model_extra
    assert first.model_extra["eadaprune"]["tokens_saved"] > 0
    server.process.send_signal(signal.SIGTERM)
    if is_finished:
        *_, last = stream
        assert last.usage
        assert last.usage.completion_tokens == TOKENS
    else:
        with pytest.raises(APIError):
            list(stream)
    assert server.process.wait(60) == 0


def test_the_manifest_has_that_flag() -> None:
    (container,) = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]["containers"]
    assert STOPPED_ANSWERS[0][1] in container["args"]
