"""LLaVA-1.5 under an older vLLM: ``EADAPRUNE_OLDER_PYTHON`` names the Python of an environment that has it, and this
package."""

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from harness import Server
from PIL import Image
from shared import Reference
from test_parity import difference, first_token

PYTHON = os.environ.get("EADAPRUNE_OLDER_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="EADAPRUNE_OLDER_PYTHON is not set")]
Images = dict[str, Image.Image]
QUESTION = "What is it?"
NAMES = ("flat", "coffee", "noise")


class OlderServer(Server):
    COMMAND = str(Path(PYTHON).parent / "vllm")


@pytest.fixture(scope="module")
def stock_answers(logs: Path, model: Path, images: Images) -> dict[str, tuple[int, dict[str, float]]]:
    """Prompt tokens and the likeliest first tokens of each image; the server ends before the next one starts."""
    with OlderServer(logs / "older-stock.log", model, "--enforce-eager", "--dtype", "float32") as server:
        return {
            name: (server.prompt_tokens(images[name], QUESTION), first_token(server, images[name])) for name in NAMES
        }


@pytest.fixture(scope="module")
def older(stock_answers: object, logs: Path, model: Path) -> Iterator[Server]:
    flags = ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--enforce-eager", "--dtype", "float32"]
    with OlderServer(logs / "older.log", model, *flags, EADAPRUNE_SKIP_VERSION_CHECK="1") as server:
        yield server


def test_at_energy_1_it_is_stock_vllm(
    older: Server, stock_answers: dict[str, tuple[int, dict[str, float]]], images: Images
) -> None:
    for name, (tokens, first) in stock_answers.items():
        assert older.prompt_tokens(images[name], QUESTION, options={"energy": 1}) == tokens
        assert difference(first_token(older, images[name], {"energy": 1}), first) < 1e-5


def test_prompt_tokens_are_text_plus_kept(older: Server, model: Path, images: Images) -> None:
    reference = Reference(model, torch.float32)
    text = older.text_tokens(QUESTION)
    for name in NAMES:
        for options in ({}, {"energy": 0.9}, {"energy": 0.99, "selector": "attention"}, {"max_tokens": 20}):
            kept = len(reference.kept(images[name], **({"energy": 0.95} | options)))
            assert kept < 576
            assert older.prompt_tokens(images[name], QUESTION, options=options) == text + kept


def test_new_and_cached_images_in_one_request(older: Server, images: Images) -> None:
    """Those that are cached are told from those that are not, in whatever order they come."""
    before = older.metric("eadaprune_images_total")
    options = {"energy": 0.97}
    alone = {name: older.ask(images[name], options=options).model_dump()["eadaprune"] for name in ("coffee", "noise")}
    together = older.ask(*(images[name] for name in ("flat", "noise", "page", "coffee")), options=options)
    reports = together.model_dump()["eadaprune"]["images"]
    assert [report["cached"] for report in reports] == [False, True, False, True]
    for report, name in ((reports[1], "noise"), (reports[3], "coffee")):
        assert report["kept_tokens"] == alone[name]["kept_tokens"]
    assert older.metric("eadaprune_images_total") == before + 6


@pytest.mark.parametrize("options", [{"energy": 1.5}, {"energy": "0.5"}, {"engery": 0.5}, 0.5])
@pytest.mark.parametrize("field", ["eadaprune", "mm_processor_kwargs"])
def test_bad_options_are_a_400(older: Server, images: Images, options: object, field: str) -> None:
    before = older.metric("eadaprune_rejected_requests_total", reason="options")
    body = {"eadaprune": options} if field == "eadaprune" else {field: {"eadaprune": options}}
    with pytest.raises(openai.BadRequestError, match="eadaprune"):
        older.ask(images["flat"], QUESTION, **body)
    assert older.metric("eadaprune_rejected_requests_total", reason="options") == before + 1
    assert older.ask(QUESTION)
