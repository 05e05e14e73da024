"""Prefill apart from decoding: one server prefills, another loads its KV cache with NIXL, and decodes. What the first
decided about images travels with the request, and the second neither decides nor encodes."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Start
from harness import Server, content
from inprocess import message
from instances import FLAGS, NIXL, PREFILL, Body, Images, answer, chat, encoded, encoder, reported, with_options
from shared import noise
from test_library import SCRIPT as LIBRARY
from test_offline import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def nixl() -> Path:
    """A folder with NIXL, which needs no GPU to be imported."""
    folder = Path(sys.prefix, "nixl")
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, "nixl", "nixl-cu12"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NIXL cannot be installed: {done.stderr[-300:]}")
    return folder


@dataclass
class Instances:
    """Two servers, and the proxy between them."""

    prefill: Server
    decode: Server

    def prefilled(self, body: Body, earlier: Body | None = None) -> Any:
        """What the first instance returns for the second; ``earlier`` is what the second returned a turn before."""
        params = PREFILL | {name: value for name, value in (earlier or {}).items() if not name.startswith("do_")}
        response = self.prefill.post(
            "/v1/chat/completions", body | {"max_tokens": 1, "stream": False, "kv_transfer_params": params}
        )
        assert response.status_code == 200, response.text
        return response.json()["kv_transfer_params"]

    def ask(self, body: Body) -> Any:
        """What both answer together."""
        response = self.decode.post("/v1/chat/completions", body | {"kv_transfer_params": self.prefilled(body)})
        assert response.status_code == 200, response.text
        return response.json()

    def ask_prefill_alone(self, body: Body) -> Any:
        response = self.prefill.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def encoded(self) -> float:
        """How many images the second instance decided about."""
        return self.decode.metric("eadaprune_stage_seconds_count", stage="encode")

    def loaded(self) -> float:
        """How many tokens of prompts it loaded, or had."""
        return sum(self.decode.metric(f"vllm:{kind}prefix_cache_hits_total") for kind in ("", "external_"))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(nixl: Path, core: int) -> dict[str, str]:
    """Of an instance that has a core to itself."""
    # It is bound late, so it is none of those that the system gives away meanwhile.
    port = next(port for port in random.sample(range(20_000, 32_000), 9) if not listens(port))
    env = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(nixl)]))
    env |= {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    return env | {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def started(start: Start, nixl: Path) -> Callable[..., Instances]:
    def both(name: str, **settings: Any) -> Instances:
        flags = [*FLAGS, "--kv-transfer-config", json.dumps(NIXL)]
        return Instances(
            *(
                start(f"{name}-{role}", *flags, **settings, **environment(nixl, core))
                for core, role in enumerate(("prefill", "decode"))
            )
        )

    return both


@pytest.fixture(scope="module")
def instances(started: Callable[..., Instances]) -> Instances:
    return started("llava")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llava_next", ["square", "small"]),  # newlines
        ("qwen2_5_vl", ["square", "wide"]),  # M-RoPE
        ("qwen2_5_vl", ["small", "clip"]),
        ("qwen3_vl", ["clip"]),  # text between frames
    ],
)
def test_other_families(
    started: Callable[..., Instances], family: Callable[[str], Path], name: str, words: list[str]
) -> None:
    instances = started(name, model=family(name))
    # These come first: an instance that is idle takes a core, as long as it has blocks for another.
    try:
        for options in (None, {"energy": 0.9}):
            body = chat() | {"messages": [message([*words, "What is it?"], options)]}
            encoded = instances.encoded()
            together, alone = instances.ask(body), instances.ask_prefill_alone(body)
            assert answer(together) == answer(alone)
            assert reported(together) == reported(alone)
            assert instances.encoded() == encoded
    finally:
        instances.prefill.close()
        instances.decode.close()


@pytest.mark.parametrize(
    "options", [None, {"energy": 0.99}, {"energy": 0.9}, {"energy": 1.0}, {"selector": "attention"}]
)
@pytest.mark.parametrize("count", [1, 2])
def test_two_instances_answer_as_one(instances: Instances, images: Images, options: Any, count: int) -> None:
    parts = [images["coffee"], noise(9100, blocks=24)][:count]
    body = chat(*parts, eadaprune=options)
    encoded, loaded = instances.encoded(), instances.loaded()
    together = instances.ask(body)
    alone = instances.ask_prefill_alone(body)
    assert answer(together) == answer(alone)
    assert reported(together) == reported(alone)
    assert instances.encoded() == encoded
    assert instances.loaded() - loaded == together["usage"]["prompt_tokens"]


@pytest.mark.parametrize("other", [{"energy": 0.99}, {"energy": 1.0}, {"selector": "random"}])
def test_options_of_the_second_instance_do_not_matter(instances: Instances, images: Images, other: Any) -> None:
    body = chat(images["moon"], eadaprune={"energy": 0.8})
    alone = instances.ask_prefill_alone(body)
    body |= {"kv_transfer_params": instances.prefilled(body), "eadaprune": other}
    response = instances.decode.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert answer(response.json()) == answer(alone)
    assert reported(response.json()) == reported(alone)


WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda given: given.pop("eadaprune"), "has no decision about image 0"),
    (lambda given: given["eadaprune"]["image"].clear(), "has no decision about image 0"),
    (lambda given: given["eadaprune"]["image"][0].update(hash="0" * 64), "is about another image"),
    (
        lambda given: given["eadaprune"]["image"].extend(given["eadaprune"]["image"]),
        "has 2 decisions, and the request 1",
    ),
    (lambda given: given["eadaprune"]["image"][0].update(kept="#"), "kept"),
    (lambda given: given["eadaprune"]["image"][0].update(kept="AAAA"), "is not a bitmap of 576 placeholders"),
    (lambda given: given["eadaprune"]["image"][0]["report"].update(kept_tokens=3), "and the report 3"),
    (lambda given: given["eadaprune"]["image"][0]["report"].update(visual_tokens=577), "is not a bitmap of 577"),
    (lambda given: given["eadaprune"]["image"][0].update(kept=None), "kept is null"),
    (lambda given: given["eadaprune"]["image"][0].update(more=1), "Extra inputs are not permitted"),
    (lambda given: given.update(eadaprune=[1]), "valid dictionary"),
    (lambda given: given.update(remote_num_tokens=9), "remote_num_tokens=9 is less than"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_wrong_decisions_are_refused(
    instances: Instances, images: Images, change: Callable[[Any], object], words: str
) -> None:
    body = chat(images["rocket"], eadaprune={"energy": 0.9})
    params = instances.prefilled(body)
    change(params)
    response = instances.decode.post("/v1/chat/completions", body | {"kv_transfer_params": params})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == "kv_transfer_params"


def test_streamed_answers(instances: Instances, images: Images) -> None:
    body = chat(images["page"], eadaprune={"energy": 0.9})
    alone = instances.ask_prefill_alone(body)["choices"][0]["message"]["content"]
    params = instances.prefilled(body)
    with httpx.stream(
        "POST",
        f"{instances.decode.url}/v1/chat/completions",
        json=body | {"stream": True, "kv_transfer_params": params},
        timeout=120,
    ) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert text == alone
    assert reported(events[0])[0]["kept_tokens"] == params["eadaprune"]["image"][0]["report"]["kept_tokens"]


def test_the_second_instance_encodes_if_it_must(instances: Instances, images: Images) -> None:
    """The blocks cannot be loaded: with the policy ``recompute`` it prefills itself, and keeps the same tokens."""
    body = chat(images["astronaut"], eadaprune={"energy": 0.9})
    alone = instances.ask_prefill_alone(body)
    params = instances.prefilled(body) | {"remote_engine_id": "gone", "remote_port": 1}
    response = instances.decode.post("/v1/chat/completions", body | {"kv_transfer_params": params})
    assert response.status_code == 200, response.text
    assert answer(response.json()) == answer(alone)


def test_a_conversation_goes_both_ways(instances: Instances) -> None:
    """In the second turn the first instance loads what the second has of the first turn, and decides about what is
    new."""
    first, second = noise(9200, blocks=24), noise(9201, blocks=24)
    body = chat(first, eadaprune={"energy": 0.9}, max_tokens=40)
    reply = instances.ask(body)
    assert reply["kv_transfer_params"]["eadaprune"]["image"]
    said = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
    body["messages"] += [said, {"role": "user", "content": content(second, "And this?")}]
    body["eadaprune"] = {"energy": 0.8}  # of the new image only: the other one's blocks are there
    params = instances.prefilled(body, reply["kv_transfer_params"])
    kept = [image["report"]["kept_tokens"] for image in params["eadaprune"]["image"]]
    assert kept[0] == reported(reply)[0]["kept_tokens"]
    response = instances.decode.post("/v1/chat/completions", body | {"kv_transfer_params": params})
    assert response.status_code == 200, response.text
    assert [image["kept_tokens"] for image in reported(response.json())] == kept
    earlier = dict(reply["kv_transfer_params"])
    del earlier["eadaprune"]
    refused = instances.prefill.post("/v1/chat/completions", body | {"kv_transfer_params": PREFILL | earlier})
    assert refused.status_code == 400, refused.text
    assert "has no decision about image 0" in refused.json()["error"]["message"]


def test_a_preempted_request_keeps_its_tokens(start: Start, nixl: Path, instances: Instances) -> None:
    """The second instance has too few blocks for two answers: it prefills one of them again, itself."""
    one_way = NIXL | {"kv_connector_extra_config": {}}  # both ways, it would hold the first answer's blocks meanwhile
    flags = ["--kv-transfer-config", json.dumps(one_way), "--num-gpu-blocks-override", "20", "--max-model-len", "576"]
    with start("small", *FLAGS, *flags, **environment(nixl, 1)) as small:
        both = Instances(instances.prefill, small)
        kept = {"min_tokens": 250, "max_tokens": 250}  # nine blocks each
        bodies = [chat(noise(9300 + n, blocks=24), eadaprune=kept, max_tokens=60) for n in range(2)]
        alone = [answer(both.ask_prefill_alone(body)) for body in bodies]
        with ThreadPoolExecutor() as pool:
            assert [answer(found) for found in pool.map(both.ask, bodies)] == alone
        assert small.metric("vllm:num_preemptions_total") > 0


def test_all_three_apart(start: Start, nixl: Path, instances: Instances, images: Images, tmp_path: Path) -> None:
    """One instance encodes and decides, one prefills, and one decodes."""
    body = with_options(chat(images["chelsea"], noise(9400, blocks=24)), {"energy": 0.9})
    alone = instances.ask_prefill_alone(body)
    transfer = ["--kv-transfer-config", json.dumps(NIXL), *encoder("consumer", tmp_path)]
    with (
        start("encode", *FLAGS, *encoder("producer", tmp_path)) as encode,
        start("consume", *FLAGS, *transfer, **environment(nixl, 0)) as prefill,
    ):
        decisions = instances.encoded()
        three = Instances(prefill, instances.decode)
        together = three.ask(body | {"ec_transfer_params": encoded(encode, body)})
        assert prefill.metric("eadaprune_stage_seconds_count", stage="encode") == 0
    assert instances.encoded() == decisions
    assert answer(together) == answer(alone)
    assert reported(together) == reported(alone)


def test_programs_that_call_the_engine_themselves(
    instances: Instances, images: Images, nixl: Path, model: Path, tmp_path: Path
) -> None:
    """``AsyncLLM`` in place of the second server, as Dynamo's workers call it."""
    body = chat(images["coffee"], eadaprune={"energy": 0.9})
    alone = answer(instances.ask_prefill_alone(body))
    body["kv_transfer_params"] = instances.prefilled(body)
    request = tmp_path / "request.json"
    request.write_text(json.dumps(body))
    assert run("decode", model, request, script=LIBRARY, **environment(nixl, 1)) == list(alone)
