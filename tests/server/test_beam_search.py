"""Beam search: every step of every beam is a request of its own, of one prompt that was rendered once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import Server
from PIL import Image
from shared import Reference, noise

Images = dict[str, Image.Image]
QUESTION = "What is it?"


def answers(server: Server, *parts: Image.Image | str, **settings: Any) -> tuple[int, list[list[int]]]:
    """How many tokens the prompt has, and those of each answer."""
    found = server.ask(*parts, max_tokens=8, return_token_ids=True, **settings)
    assert found.usage
    return found.usage.prompt_tokens, [(choice.model_extra or {})["token_ids"] for choice in found.choices]


def beams(server: Server, *parts: Image.Image | str, width: int = 3, **settings: Any) -> tuple[int, list[list[int]]]:
    """The same of the best beams."""
    return answers(server, *parts, use_beam_search=True, n=width, **settings)


def test_at_energy_one_the_beams_are_stock_vllms(pruning: Server, stock: Server, images: Images) -> None:
    for image in images.values():
        found = beams(pruning, image, QUESTION, options={"energy": 1})
        assert found == beams(stock, image, QUESTION)
        assert len({*map(tuple, found[1])}) == 3


def test_prompts_are_pruned(pruning: Server, reference: Reference, images: Images) -> None:
    text = pruning.text_tokens(QUESTION)
    for image in images.values():
        for options in ({"energy": 0.9}, {"energy": 0.99, "selector": "attention"}):
            tokens, found = beams(pruning, image, QUESTION, options=options)
            assert tokens == text + len(reference.kept(image, **options))
            assert beams(pruning, image, QUESTION, options=options) == (tokens, found)


def test_a_single_beam_is_the_greedy_answer(pruning: Server, images: Images) -> None:
    parts, options = (images["coffee"], "and", images["page"], QUESTION), {"energy": 0.97}
    assert beams(pruning, *parts, options=options, width=1) == answers(pruning, *parts, options=options)


def test_the_report_is_that_of_other_requests(pruning: Server) -> None:
    def report(**extra: Any) -> Any:
        answer = pruning.ask(noise(8100, blocks=30), QUESTION, options={"energy": 0.9}, **extra)
        assert answer.model_extra
        return {key: value for key, value in answer.model_extra["eadaprune"].items() if key != "seconds"}

    new, cached, plain = report(use_beam_search=True, n=2), report(use_beam_search=True, n=2), report()
    assert new["images"][0].pop("cached") is False
    assert cached["images"][0].pop("cached") is plain["images"][0].pop("cached") is True
    assert new == cached == plain


def test_many_concurrent_embeddings_beside_other_requests(pruning: Server, reference: Reference) -> None:
    scenes = [noise(8200 + number % 6, blocks=20 + number % 6) for number in range(12)]
    options = {"energy": 0.95}

    def ask(image: Image.Image) -> tuple[int, int]:
        return beams(pruning, image, QUESTION, options=options)[0], pruning.prompt_tokens(
            image, QUESTION, options=options
        )

    text = pruning.text_tokens(QUESTION)
    with ThreadPoolExecutor(6) as pool:
        counted = list(pool.map(ask, scenes))
    kept = [text + len(reference.kept(image, **options)) for image in scenes]
    assert counted == [(tokens, tokens) for tokens in kept]
    pruning.wait_until_idle()
