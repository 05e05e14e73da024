"""Requests to several instances, and what is compared of their answers."""

import json
from pathlib import Path
from typing import Any

from harness import Server, content
from PIL import Image

Body = dict[str, Any]
Images = dict[str, Image.Image]
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "16", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 2}']
NIXL: Body = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
NIXL |= {"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"bidirectional_kv_xfer": True}}
PREFILL: Body = {"do_remote_decode": True, "do_remote_prefill": False}
PREFILL |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))


def encoder(role: str, store: Path) -> list[str]:
    """Flags of an instance that encodes (``producer``), or takes embeddings from the store (``consumer``)."""
    transfer: Body = {"ec_connector": "ECExampleConnector", "ec_role": f"ec_{role}"}
    transfer |= {"ec_connector_extra_config": {"shared_storage_path": str(store)}}
    return ["--no-enable-prefix-caching", "--ec-transfer-config", json.dumps(transfer)]


def encoded(encode: Server, body: Body, **extra: Any) -> Body:
    """What an instance that encodes returns about each image, which is sent to it by itself, as vLLM's proxy does."""
    params: Body = {}
    for part in body["messages"][0]["content"]:
        if part["type"] != "text":
            alone = {"model": "demo", "messages": [{"role": "user", "content": [part | extra]}]}
            response = encode.post("/v1/chat/completions", alone)
            assert response.status_code == 200, response.text
            params |= response.json()["ec_transfer_params"]
    return params


def with_options(body: Body, options: Any) -> Body:
    """With the options in each image: those travel to an instance that encodes, the body's field does not."""
    for part in body["messages"][0]["content"]:
        if part["type"] != "text" and options:
            part["eadaprune"] = options
    return body


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
