"""One server encodes images, and another takes their embeddings from a store. The first decides what is kept, and the
second neither decides nor encodes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Start
from harness import Server
from inprocess import message
from instances import FLAGS, Body, Images, answer, chat, encoded, encoder, reported, with_options
from safetensors.torch import load_file, save_file
from shared import noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Encoder:
    """An instance that encodes, one that takes its embeddings, and the proxy between them."""

    encode: Server
    consume: Server
    store: Path

    def encoded(self, body: Body, **extra: Any) -> Body:
        return encoded(self.encode, body, **extra)

    def ask(self, body: Body, **extra: Any) -> Any:
        """What the second answers."""
        response = self.consume.post("/v1/chat/completions", body | extra)
        assert response.status_code == 200, response.text
        return response.json()

    def decisions(self) -> float:
        """How many images the second decided about."""
        return self.consume.metric("eadaprune_stage_seconds_count", stage="encode")

    def stored(self, identifier: str) -> Path:
        return self.store / identifier / "encoder_cache.safetensors"


@pytest.fixture(scope="module")
def started(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Encoder]:
    def both(name: str, **settings: Any) -> Encoder:
        store, servers = tmp_path_factory.mktemp("store"), list[Server]()
        for role in ("producer", "consumer"):
            flags = [*FLAGS, *encoder(role, store)]
            servers.append(start(f"{name}-{role}", *flags, VLLM_SERVER_DEV_MODE="1", **settings))
        encode, consume = servers
        return Encoder(encode, consume, store)

    return both


@pytest.fixture(scope="module")
def apart(started: Callable[..., Encoder]) -> Encoder:
    return started("llava")


@pytest.mark.parametrize("options", [None, {"energy": 0.9}, {"energy": 1.0}, {"selector": "attention"}])
@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_those_of_one_instance(apart: Encoder, images: Images, options: Any, count: int) -> None:
    body = with_options(chat(*[images["coffee"], noise(9300, blocks=24)][:count]), options)
    params, decisions = apart.encoded(body), apart.decisions()
    for identifier in params:
        assert apart.stored(identifier).exists()
    together = apart.ask(body, ec_transfer_params=params)
    assert apart.decisions() == decisions
    alone = apart.ask(body)
    assert answer(together) == answer(alone)
    assert reported(together) == reported(alone)


def test_embeddings_come_from_the_store(apart: Encoder, images: Images) -> None:
    """Others in the store give another answer."""
    body = with_options(chat(images["moon"]), {"energy": 0.8})
    ((identifier, entry),) = (params := apart.encoded(body)).items()
    embeddings = load_file(apart.stored(identifier))["ec_cache"]
    assert len(embeddings) == entry["eadaprune"]["report"]["kept_tokens"]
    answers = [answer(apart.ask(body))]
    for stored in (embeddings, torch.zeros_like(embeddings)):
        save_file({"ec_cache": stored}, apart.stored(identifier))
        assert apart.consume.post("/reset_encoder_cache", "").status_code == 200
        answers.append(answer(apart.ask(body, ec_transfer_params=params)))
    alone, same, other = answers
    assert same == alone != other


@pytest.mark.parametrize("other", [{"energy": 0.99}, {"energy": 1.0}, {"selector": "random"}])
def test_options_of_the_second_instance_do_not_matter(apart: Encoder, images: Images, other: Any) -> None:
    alone = apart.ask(with_options(chat(images["page"]), {"energy": 0.8}))
    params = apart.encoded(with_options(chat(images["page"]), {"energy": 0.8}))
    together = apart.ask(with_options(chat(images["page"]), other), ec_transfer_params=params)
    assert answer(together) == answer(alone)
    assert reported(together) == reported(alone)


def test_an_empty_store(apart: Encoder, images: Images) -> None:
    """The second instance encodes, and keeps the same tokens."""
    body = with_options(chat(images["rocket"]), {"energy": 0.9})
    params = apart.encoded(body)
    for identifier in params:
        shutil.rmtree(apart.store / identifier)
    together = apart.ask(with_options(chat(images["rocket"]), {"energy": 0.5}), ec_transfer_params=params)
    assert answer(together) == answer(apart.ask(body))


def test_an_encoder_that_decides_nothing(apart: Encoder, images: Images) -> None:
    """Without the plugin it returns no decision: the second instance makes its own."""
    body = with_options(chat(images["astronaut"]), {"energy": 0.9})
    params = apart.encoded(body)
    for entry in params.values():
        del entry["eadaprune"]
    decisions = apart.decisions()
    together = apart.ask(body, ec_transfer_params=params)
    assert apart.decisions() == decisions + 1
    assert answer(together) == answer(apart.ask(body))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": "#"}, "kept"),
        ({"kept": "AAAA"}, "is not a bitmap of 576 placeholders"),
        ({"more": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_decisions_are_refused(apart: Encoder, images: Images, changes: Body, words: str) -> None:
    body = with_options(chat(images["chelsea"]), {"energy": 0.9})
    params = apart.encoded(body)
    for entry in params.values():
        entry["eadaprune"] |= changes
    response = apart.consume.post("/v1/chat/completions", body | {"ec_transfer_params": params})
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "ec_transfer_params"


def test_without_pixels(started: Callable[..., Encoder], family: Callable[[str], Path]) -> None:
    """vLLM's proxy sends the second instance only what sizes the placeholders of an image."""
    apart = started("qwen2_5_vl", model=family("qwen2_5_vl"))
    try:
        for number, options in enumerate((None, {"energy": 0.9}, {"energy": 1.0})):
            body = chat() | {"messages": [message(["square", "What is it?"], options)]}
            uuid = f"{number}" * 64
            params, decisions = apart.encoded(body, uuid=uuid), apart.decisions()
            ((identifier, entry),) = params.items()
            assert identifier.startswith(uuid)
            (grid,) = entry["metadata"].values()
            part = {"type": "image_embeds", "image_embeds": {"image_grid_thw": grid}, "uuid": uuid}
            without = chat() | {"messages": [{"role": "user", "content": [part, *body["messages"][0]["content"][1:]]}]}
            refused = apart.consume.post("/v1/chat/completions", without)
            assert refused.status_code == 400, refused.text
            assert "are missing, and no other instance decided" in refused.json()["error"]["message"]
            together = apart.ask(without, ec_transfer_params=params)
            assert apart.decisions() == decisions
            alone = apart.ask(body)
            assert answer(together) == answer(alone)
            assert reported(together) == reported(alone)
    finally:
        apart.encode.close()
        apart.consume.close()
