"""What holds in half precision, in which the same picture may keep a token more or less in other company: all that is
said of a request is of one decision."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Start
from harness import Server, content
from openai.types.chat import ChatCompletion
from PIL import Image
from shared import noise
from test_parity import difference, first_token

Images = dict[str, Image.Image]
QUESTION = "What is it?"
FLAGS = ["--enforce-eager", "--dtype", "bfloat16", "--limit-mm-per-prompt", '{"image": 2}']
NULL, SOME = {"energy": 1.0}, {"energy": 0.9}
TOLERANCE = 0.05  # of log-probabilities


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    return start(
        "bfloat16", "--plugin", "eadaprune", "--eadaprune-min-tokens", "4", "--eadaprune-report-cached", *FLAGS
    )


@pytest.fixture(scope="module")
def text(server: Server) -> int:
    return server.text_tokens(QUESTION)


def report(answer: ChatCompletion) -> dict[str, Any]:
    found: dict[str, Any] = (answer.model_extra or {})["eadaprune"]
    return found


def check(answer: ChatCompletion, text: int) -> int:
    """How many tokens were kept of a request with one image, after the report and ``usage``."""
    assert answer.usage
    kept = int(report(answer)["kept_tokens"])
    assert answer.usage.prompt_tokens == text + kept
    return kept


def test_reports_of_all_endpoints_agree(server: Server, images: Images, text: int) -> None:
    cases: list[tuple[dict[str, Any], range]] = [
        (NULL, range(576, 577)),
        (SOME, range(4, 576)),
        ({"energy": 0.97, "selector": "attention"}, range(4, 576)),
        ({"min_tokens": 20, "max_tokens": 20}, range(20, 21)),
    ]
    for name in ("flat", "coffee", "noise"):
        image = images[name]
        for options, expected in cases:
            kept = check(server.ask(image, QUESTION, options=options), text)
            body = {"model": "demo", "messages": [{"role": "user", "content": content(image, QUESTION)}]}
            counted = server.post("/tokenize", body | {"eadaprune": options}).json()["count"]
            assert counted == text + kept
            assert kept in expected


@pytest.mark.slow
def test_at_energy_one_answers_are_stock_vllms(server: Server, start: Start, images: Images) -> None:
    with start("bfloat16-stock", *FLAGS) as stock:
        for image in images.values():
            assert server.prompt_tokens(image, QUESTION, options=NULL) == stock.prompt_tokens(image, QUESTION)
            assert difference(first_token(server, image, NULL), first_token(stock, image)) < TOLERANCE


def test_pruning_changes_answers_by_more_than_rounding(server: Server, images: Images) -> None:
    full, pruned = (first_token(server, images["astronaut"], {"energy": energy}) for energy in (1.0, 0.8))
    assert max(full[token] - pruned.get(token, -99.0) for token in full) > 2 * TOLERANCE


def test_repeated_image_has_the_same_result(server: Server, text: int) -> None:
    image = noise(8300, blocks=20)
    new, again = (server.ask(image, QUESTION, options=SOME) for _ in range(2))
    assert [report(answer)["images"][0]["cached"] for answer in (new, again)] == [False, True]
    assert check(new, text) == check(again, text)
    before = server.metric("vllm:prefix_cache_hits_total")
    assert difference(first_token(server, image, SOME), first_token(server, image, SOME)) < TOLERANCE
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_two_images_cost_what_each_costs(server: Server, images: Images) -> None:
    coffee, dense = images["coffee"], images["noise"]
    kept = [report(server.ask(image, options=SOME))["kept_tokens"] for image in (coffee, dense)]
    both = server.ask(coffee, "and", dense, options=SOME)
    assert [image["kept_tokens"] for image in report(both)["images"]] == kept
    full = server.prompt_tokens(coffee, "and", dense, options=NULL)
    assert both.usage
    assert both.usage.prompt_tokens == full - 2 * 576 + sum(kept)


def test_concurrent_requests(server: Server, text: int) -> None:
    """Of new images and of known ones, each several times under several thresholds."""
    cases = [(number % 5, energy) for number in range(10) for energy in (0.8, 0.95, 1.0)]

    def ask(case: tuple[int, float]) -> int:
        number, energy = case
        return check(server.ask(noise(8400 + number, blocks=10 + number), QUESTION, options={"energy": energy}), text)

    with ThreadPoolExecutor(8) as pool:
        kept = dict(zip(cases, pool.map(ask, cases), strict=True))
        again = dict(zip(cases, pool.map(ask, cases), strict=True))
    assert kept == again
    assert all((count == 576) == (energy == 1) for (_, energy), count in kept.items())
    server.wait_until_idle()
