"""At energy 1.0 the answers are stock vLLM's; installed but not named, the server is stock vLLM."""

import math
from collections.abc import Callable

import httpx
from harness import Server
from PIL import Image

Images = dict[str, Image.Image]
QUESTION = "What is it?"


def first_token(server: Server, image: Image.Image, options: object = None) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens, by token id."""
    extra = {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
    response = server.ask(image, QUESTION, options=options, **extra)
    assert response.choices[0].logprobs
    assert response.choices[0].logprobs.content
    return {top.token: top.logprob for top in response.choices[0].logprobs.content[0].top_logprobs}


def difference(first: dict[str, float], second: dict[str, float]) -> float:
    """Largest difference over the tokens that both lists hold; the last places may differ in a near tie."""
    shared = first.keys() & second.keys()
    assert len(shared) >= 17
    return max(abs(first[token] - second[token]) for token in shared)


def test_answers_are_stocks(pruning: Server, stock: Server, images: Images) -> None:
    for image in images.values():
        assert pruning.prompt_tokens(image, QUESTION, options={"energy": 1}) == stock.prompt_tokens(image, QUESTION)
        assert difference(first_token(pruning, image, {"energy": 1}), first_token(stock, image)) < 1e-5
        assert pruning.answer(image, QUESTION, options={"energy": 1}) == stock.answer(image, QUESTION)


def test_pruning_changes_the_answer_so_that_parity_means_something(pruning: Server, images: Images) -> None:
    image = images["astronaut"]
    full, pruned = (first_token(pruning, image, {"energy": energy}) for energy in (1.0, 0.8))
    assert max(abs(full[token] - pruned.get(token, -math.inf)) for token in full) > 0.3


def test_float32_to_1e_5(stock: Server, start: Callable[..., Server], images: Images) -> None:
    """Also with ``torch.compile`` on in the pruning server, and off in the stock one."""
    pruning = start("pruning-float32", "--plugin", "eadaprune", "--eadaprune-energy", "1.0", "--dtype", "float32")
    for image in images.values():
        assert pruning.prompt_tokens(image, QUESTION) == stock.prompt_tokens(image, QUESTION)
        assert difference(first_token(pruning, image), first_token(stock, image)) < 1e-5
        assert pruning.answer(image, QUESTION) == stock.answer(image, QUESTION)
    assert pruning.prompt_tokens(images["flat"], options={"energy": 0.9}) < stock.prompt_tokens(images["flat"])


def test_installed_but_not_named_changes_nothing(stock: Server, images: Images) -> None:
    assert stock.prompt_tokens(images["flat"], options={"energy": 0.5}) == stock.prompt_tokens(images["noise"])
    assert not [sample.name for sample in stock.samples() if sample.name.startswith("eadaprune")]
    assert "eadaprune" not in httpx.get(f"{stock.url}/openapi.json", timeout=120).text
    # Where else than in its log vLLM does not say that it left the endpoints of a plugin out.
    log = stock.log.read_text()
    (warning,) = [line for line in log.splitlines() if "eadaprune" in line and ("WARN" in line or "ERROR" in line)]
    assert "Found endpoint plugin(s) ['eadaprune'] but VLLM_PLUGINS is not set" in warning
