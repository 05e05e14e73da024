"""A KV connector that stores blocks: what another server computed is used again where the same was kept of images, and
nowhere else."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from harness import BLOCK_SIZE, Server
from PIL import Image
from shared import noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# vLLM's example stores a prompt that is computed in one step.
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "16", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 2}', "--max-num-batched-tokens", "4096"]
FIXED = {"min_tokens": 150, "max_tokens": 150}
OPTIONS: list[dict[str, Any]] = [
    {"energy": 1.0},
    {"energy": 0.99},
    {"energy": 0.95},
    {"energy": 0.99, "selector": "attention"},
    FIXED | {"energy": 0.5},
]
Images = dict[str, Image.Image]
Found = tuple[int, str | None, int]


def ask(server: Server, images: Images, options: dict[str, Any]) -> list[Found]:
    """Of a request with one image and one with two: tokens, the answer, and tokens that came from the store."""
    found = []
    for parts in ([images["coffee"]], [noise(9001, blocks=30), "and", images["coffee"]]):
        before = server.metric("vllm:external_prefix_cache_hits_total")
        answer = server.ask(*parts, "What is it?", options=options, max_tokens=12)
        assert answer.usage
        hits = int(server.metric("vllm:external_prefix_cache_hits_total") - before)
        found.append((answer.usage.prompt_tokens, answer.choices[0].message.content, hits))
    return found


def redacted(found: list[Found]) -> list[tuple[int, str | None]]:
    return [(tokens, answer) for tokens, answer, _ in found]


def from_store(found: list[Found]) -> list[bool]:
    """Which prompts came from the store, but for what is computed in any case. Prompts of full blocks and one token are
    left out: vLLM's example stores them, and never finds them."""
    for tokens, _, hits in found:
        assert hits == 0 or tokens - 2 * BLOCK_SIZE <= hits < tokens
    return [hits > 0 for tokens, _, hits in found if tokens % BLOCK_SIZE != 1]


def store(folder: Path) -> list[str]:
    """Flags of a server that stores blocks there."""
    settings: dict[str, Any] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    settings["kv_connector_extra_config"] = {"shared_storage_path": str(folder)}
    return ["--kv-transfer-config", json.dumps(settings)]


def test_stored_blocks_are_found_by_kept_tokens(start: Start, tmp_path: Path, images: Images) -> None:
    @contextmanager
    def stored(name: str) -> Iterator[Server]:
        with start(name, *FLAGS, *store(tmp_path)) as server:
            yield server

    with start("without-store", *FLAGS) as server:
        expected = [redacted(ask(server, images, options)) for options in OPTIONS]
        other = redacted(ask(server, images, {"energy": 0.9}))
    with stored("first") as server:
        first = [ask(server, images, options) for options in OPTIONS]
    assert [redacted(found) for found in first] == expected
    assert not any(map(any, map(from_store, first)))
    with stored("second") as server:
        second = [ask(server, images, options) for options in (*OPTIONS[:-1], FIXED | {"energy": 0.6})]
        new = ask(server, images, {"energy": 0.9})
        as_many = ask(server, images, FIXED | {"energy": 0.5, "selector": "random"})
    assert [redacted(found) for found in second] == expected
    assert all(map(all, map(from_store, second)))
    assert redacted(new) == other
    assert [tokens for tokens, _, _ in as_many] == [tokens for tokens, _ in expected[-1]]
    assert not any(from_store(new) + from_store(as_many))


def test_stores_work_where_client_embeddings_do_not(
    start: Start, family: Callable[[str], Path], tmp_path: Path, images: Images
) -> None:
    """vLLM lets clients send embeddings where there is a store, and those of LLaVA-NeXT cannot be pruned."""
    model, found = family("llava_next"), []
    for name in ("next-first", "next-second"):
        with start(name, *FLAGS, *store(tmp_path), model=model) as server:
            found.append([ask(server, images, options) for options in OPTIONS[:3]])
    first, second = found
    assert list(map(redacted, first)) == list(map(redacted, second))
    assert not any(map(any, map(from_store, first)))
    assert all(map(all, map(from_store, second)))
