"""Requests to several instances, and what is compared of their answers."""

from typing import Any

from harness import content
from PIL import Image

Body = dict[str, Any]
Images = dict[str, Image.Image]
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "16", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 2}']


def chat(*parts: Image.Image | str, **extra: Any) -> Body:
    messages = [{"role": "user", "content": content(*parts, "What is it?")}]
    body = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return body | {"logprobs": True, "top_logprobs": 3} | extra


def answer(response: Any) -> tuple[Any, Any, list[float]]:
    """Text, tokens of the prompt, and log-probabilities of an answer."""
    (choice,) = response["choices"]
    logprobs = [round(token["logprob"], 3) for token in choice["logprobs"]["content"]]
    return choice["message"]["content"], response["usage"]["prompt_tokens"], logprobs


def reported(response: Any) -> list[Any]:
    """What was kept of each image."""
    return [{name: image[name] for name in image if name != "cached"} for image in response["eadaprune"]["images"]]
