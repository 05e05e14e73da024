"""One pruning server as its clients and its operator see it."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from harness import BLOCK_SIZE, KV_BYTES, Server, content
from PIL import Image
from shared import Reference, noise

Images = dict[str, Image.Image]
QUESTION = "What is it?"


def test_prompt_tokens_are_text_plus_kept(pruning: Server, reference: Reference, images: Images) -> None:
    text = pruning.text_tokens(QUESTION)
    for image in images.values():
        for options in (
            {"energy": 0.8},
            {"energy": 0.99},
            {"energy": 0.99, "selector": "attention"},
            {"max_tokens": 20},
        ):
            kept = len(reference.kept(image, **({"energy": 0.95} | options)))
            assert pruning.prompt_tokens(image, QUESTION, options=options) == text + kept


def test_budgets_follow_the_image(pruning: Server, images: Images) -> None:
    counts = {name: pruning.prompt_tokens(image, options={"energy": 0.99}) for name, image in images.items()}
    assert counts["flat"] < counts["chelsea"] < counts["noise"]


@pytest.mark.parametrize("options", [{"energy": 1}, {"energy": 1.0}, {"enabled": False}])
def test_energy_one_keeps_every_token(pruning: Server, images: Images, options: dict[str, Any]) -> None:
    assert pruning.prompt_tokens(images["flat"], options=options) == pruning.prompt_tokens(
        images["noise"], options={"energy": 1}
    )


def test_several_images_and_the_same_one_twice(pruning: Server, reference: Reference, images: Images) -> None:
    options = {"energy": 0.99}
    kept = {name: len(reference.kept(image, **options)) for name, image in images.items()}
    assert len({kept[name] for name in ("coffee", "noise", "flat")}) == 3
    coffee, dense, flat = images["coffee"], images["noise"], images["flat"]
    parts: list[Image.Image | str] = [coffee, "and", dense, coffee, "or", flat, QUESTION]
    once = pruning.ask(*parts, options=options)
    assert once.usage
    four_flat = [part if isinstance(part, str) else flat for part in parts]
    text = pruning.prompt_tokens(*four_flat, options=options) - 4 * kept["flat"]
    assert once.usage.prompt_tokens == text + 2 * kept["coffee"] + kept["noise"] + kept["flat"]
    assert pruning.ask(*parts, options=options).choices[0].message.content == once.choices[0].message.content


def test_text_only_requests_are_served(pruning: Server) -> None:
    assert pruning.prompt_tokens(QUESTION) < 40


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"energy": 1.5}, "energy", "=1.5 is not allowed; it must be a number greater than 0 and at most 1"),
        ({"energy": True}, "energy", "=True is not allowed"),
        ({"energy": "0.5"}, "energy", "='0.5' is not allowed"),
        ({"engery": 0.5}, "engery", "is not an option; the options are target, energy"),
        ({"min_tokens": 9, "max_tokens": 8}, None, "min_tokens=9 is above max_tokens=8"),
        (0.5, None, "=0.5 is not an object"),
    ],
)
@pytest.mark.parametrize("with_image", [True, False])
def test_bad_options_are_a_400(
    pruning: Server, images: Images, options: object, param: str | None, words: str, with_image: bool
) -> None:
    before = pruning.metric("eadaprune_rejected_requests_total", reason="options")
    with pytest.raises(openai.BadRequestError) as error:
        pruning.ask(*[images["flat"]] * with_image, QUESTION, options=options)
    assert words in error.value.message
    assert error.value.param == "eadaprune" + (f".{param}" if param else "")
    assert pruning.metric("eadaprune_rejected_requests_total", reason="options") == before + 1
    assert pruning.ask(QUESTION)


def test_nan_is_a_400(pruning: Server) -> None:
    body = '{"model": "demo", "messages": [{"role": "user", "content": "hi"}], '
    body += '"eadaprune": {"energy": NaN}}'
    response = pruning.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "nan is not allowed" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"mm_processor_kwargs": {"do_resize": False}},
        {"mm_processor_kwargs": {"eadaprune": {"energy": 0.9}, "do_resize": False}},
        {"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}}},
    ],
)
def test_other_untrusted_kwargs_are_refused_as_stock_vllm_refuses_them(
    pruning: Server, stock: Server, images: Images, extra: dict[str, Any]
) -> None:
    messages = []
    for server in (pruning, stock):
        with pytest.raises(openai.BadRequestError) as error:
            server.ask(images["flat"], **extra)
        messages.append(error.value.message)
    assert messages[0] == messages[1]
    assert "--trust-request-mm-kwargs" in messages[0]


def test_more_images_fit(pruning: Server, images: Images) -> None:
    four = [images["flat"], images["coffee"], images["rocket"], images["page"]]
    assert pruning.prompt_tokens(*four) < 2048
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        pruning.prompt_tokens(*four, options={"energy": 1})


def test_the_limit_of_images_is_vllms(pruning: Server, images: Images) -> None:
    with pytest.raises(openai.BadRequestError, match=r"[Aa]t most 4 image"):
        pruning.ask(*[images["flat"]] * 5)


def test_streaming(pruning: Server, images: Images) -> None:
    stream = pruning.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content(images["coffee"], QUESTION)}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "mm_processor_kwargs": {"eadaprune": {"energy": 0.9}}},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == pruning.answer(images["coffee"], QUESTION, options={"energy": 0.9})
    assert chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens == pruning.prompt_tokens(images["coffee"], QUESTION, options={"energy": 0.9})


def test_prefix_cache_hits_under_the_same_options_only(pruning: Server) -> None:
    image = noise(101, blocks=48)

    def cached(options: dict[str, Any]) -> float:
        before = pruning.metric("vllm:prefix_cache_hits_total")
        pruning.ask(image, QUESTION, options=options)
        return pruning.metric("vllm:prefix_cache_hits_total") - before

    first = pruning.answer(image, QUESTION, options={"energy": 0.99})
    assert cached({"energy": 0.99, "min_tokens": 16}) > 64
    assert pruning.answer(image, QUESTION, options={"energy": 0.99}) == first
    # The text before the image is shared; the image's tokens must not be, even where their number is the same.
    assert cached({"energy": 0.98}) <= BLOCK_SIZE
    assert cached({"energy": 0.99, "selector": "attention"}) <= BLOCK_SIZE


def test_concurrent_requests_with_different_thresholds(pruning: Server, images: Images) -> None:
    cases = [(name, energy) for name in images for energy in (0.7, 0.9, 0.95, 0.99)]

    def ask(case: tuple[str, float]) -> tuple[int, str | None]:
        response = pruning.ask(images[case[0]], QUESTION, options={"energy": case[1]}, max_tokens=1)
        assert response.usage
        return response.usage.prompt_tokens, response.choices[0].message.content

    alone = {case: ask(case) for case in cases}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, cases * 3)) == [alone[case] for case in cases * 3]


def test_image_in_concurrent_requests_is_encoded_once(pruning: Server) -> None:
    def encoded() -> float:
        return pruning.metric("eadaprune_stage_seconds_count", stage="encode")

    before, image = encoded(), noise(4711, blocks=20)
    with ThreadPoolExecutor(8) as pool:
        counts = set(pool.map(lambda _: pruning.prompt_tokens(image), range(8)))
    assert len(counts) == 1
    assert encoded() == before + 1


def test_evicted_images_are_encoded_again_and_decided_alike(pruning: Server, reference: Reference) -> None:
    text = pruning.text_tokens(QUESTION)
    scenes = [noise(seed, blocks=2 + seed % 30) for seed in range(150)]

    def tokens(image: Image.Image) -> int:
        return pruning.prompt_tokens(image, QUESTION, options={"energy": 0.97, "min_tokens": 1})

    before = pruning.metric("eadaprune_stage_seconds_count", stage="encode")
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(tokens, [*scenes, *scenes[:50]]))
    expected = [text + len(reference.kept(image, energy=0.97, min_tokens=1)) for image in scenes]
    assert counted == [*expected, *expected[:50]]
    assert pruning.metric("eadaprune_stage_seconds_count", stage="encode") - before > len(scenes)


def test_metrics_count_what_entered_the_engine(pruning: Server, reference: Reference) -> None:
    image = noise(7, blocks=40)
    kept = len(reference.kept(image, energy=0.9))
    names: list[tuple[str, dict[str, str]]] = [
        ("eadaprune_images_total", {}),
        ("eadaprune_visual_tokens_total", {"stage": "encoded"}),
        ("eadaprune_visual_tokens_total", {"stage": "kept"}),
        ("eadaprune_tokens_saved_total", {}),
        ("eadaprune_kv_cache_bytes_saved_total", {}),
        ("eadaprune_kept_ratio_count", {}),
        ("eadaprune_kept_ratio_sum", {}),
        ("eadaprune_energy_threshold_sum", {}),
        ("eadaprune_stage_seconds_count", {"stage": "encode"}),
        ("vllm:prompt_tokens_total", {}),
    ]

    def read() -> list[float]:
        return [pruning.metric(name, model_name="demo", **labels) for name, labels in names]

    before = read()
    prompts = [pruning.prompt_tokens(image, QUESTION, options={"energy": 0.9}) for _ in range(3)]
    change = [after - earlier for after, earlier in zip(read(), before, strict=True)]
    saved = 576 - kept
    expected = [3, 3 * 576, 3 * kept, 3 * saved, 3 * saved * KV_BYTES, 3, 3 * kept / 576, 3 * 0.9, 1, sum(prompts)]
    assert change == pytest.approx(expected)
    for stage in ("encode", "spectrum", "select", "total"):
        assert pruning.metric("eadaprune_stage_seconds_sum", stage=stage) > 0


def test_tokenize_counts_the_same_and_saves_nothing(pruning: Server, images: Images) -> None:
    before = pruning.metric("eadaprune_images_total")
    body = {"model": "demo", "messages": [{"role": "user", "content": content(images["chelsea"])}]}
    count = pruning.post("/tokenize", body).json()["count"]
    assert pruning.metric("eadaprune_images_total") == before
    assert count == pruning.prompt_tokens(images["chelsea"])


def test_uuid_only_images_hit_under_the_same_options(pruning: Server, images: Images) -> None:
    def ask(image: Image.Image | None, energy: float) -> openai.types.chat.ChatCompletion:
        part: Any = content(image)[0] if image else {"type": "image_url", "image_url": None}
        return pruning.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": [part | {"uuid": "page-1"}]}],
            max_tokens=1,
            extra_body={"eadaprune": {"energy": energy}},
        )

    first = ask(images["page"], 0.9)
    again = ask(None, 0.9)
    assert first.usage
    assert again.usage
    assert again.usage.prompt_tokens == first.usage.prompt_tokens
    with pytest.raises(
        openai.BadRequestError,
        match="must have been sent before, with the same pruning options",
    ):
        ask(None, 0.91)


def test_aborted_requests_leave_nothing_behind(pruning: Server, images: Images) -> None:
    def abort(seed: int) -> None:
        stream = pruning.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content(noise(1000 + seed), noise(2000 + seed))}],
            max_tokens=500,
            stream=True,
            extra_body={"ignore_eos": True, "eadaprune": {"energy": 0.999}},
        )
        if seed % 2:
            next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(abort, range(12)))
    pruning.wait_until_idle()
    assert pruning.prompt_tokens(images["flat"]) < 60


@pytest.mark.slow
def test_thousands_of_aborted_requests_leave_no_memory_behind(pruning: Server, images: Images) -> None:
    """Streams closed at once and after their first event, clients that do not wait, and refused requests."""
    status = Path(f"/proc/{pruning.process.pid}/status")
    body = {"model": "demo", "messages": [{"role": "user", "content": content(images["flat"])}], "max_tokens": 200}
    url = f"{pruning.url}/v1/chat/completions"
    # A connection that waited for long may be closed by the server just as it is used again.
    client = httpx.Client(timeout=120, limits=httpx.Limits(keepalive_expiry=1))

    def abort(number: int) -> None:
        if number % 4 == 0:
            client.post(url, json=body | {"eadaprune": {"energy": 7}})
        elif number % 4 == 1:
            with contextlib.suppress(httpx.TimeoutException):
                client.post(url, json=body, timeout=0.02)
        else:
            with client.stream("POST", url, json=body | {"stream": True}) as stream:
                if number % 4 == 2:
                    next(stream.iter_lines())

    def resident(requests: range) -> int:
        """Kibibytes after so many more aborted requests."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(abort, requests))
        pruning.wait_until_idle()
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1])

    first = resident(range(500))
    last = resident(range(2000))
    client.close()
    assert last - first < 20 * 1024
