"""Clients that mean no good, or know no better, and what others notice of them."""

import asyncio
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from conftest import Start
from harness import DTYPE, FRESH, Server, eventually
from PIL import Image
from shared import noise

from eadaprune_vllm.core.draw import data_url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REQUESTS, AT_A_TIME = 10_000, 50
URLS = [
    data_url(noise(seed, size, blocks)) for seed, (size, blocks) in enumerate(itertools.product((96, 336), (2, 8, 48)))
]
URLS += [data_url(noise(seed, 64, 64)) for seed in range(100, 150)]
THIN = data_url(Image.new("RGB", (1500, 1)))
OPTIONS: list[Any] = [
    None,
    {"energy": 0.5},
    {"energy": 0.9, "selector": "attention"},
    {"energy": 1.0, "max_tokens": 33},
    {"energy": 1.0},
    {"min_tokens": 2**70, "selector": "diversity"},
    {"energy": 1e-9, "min_tokens": 1},
]
BAD_OPTIONS: list[Any] = [
    {"energy": 0},
    {"energy": "0.5"},
    {"energy": True},
    {"min_tokens": -1},
    {"selector": "x" * 10_000},
    {"unknown": {"deep": [[[]]]}},
    {"max_tokens": 3, "min_tokens": 4},
    [],
    "0.5",
]
BAD_URLS = [
    "data:image/png;base64,AAAA",
    "data:image/png;base64,%%%%",
    "data:,",
    "file:///etc/passwd",
    "http://127.0.0.1:9/none.png",
    URLS[0][: len(URLS[0]) // 2],
]


def chat(*urls: Any, options: object = None, **extra: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"model": "demo", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}
    own = {} if options is None else {"eadaprune": options}
    return body | {"max_tokens": 1, "temperature": 0} | own | extra


class Client:
    """Sends one odd request at a time, each of another kind.

    Attributes:
        answers: how often each kind was answered with which status.
        costs: prompt tokens that were counted of each image under each of the options.
    """

    def __init__(self, server: Server, http: httpx.AsyncClient, bad_urls: dict[str, int]) -> None:
        self.url, self.http, self.bad_urls, self.draw = server.url, http, bad_urls, random.Random(0)
        self.answers: dict[str, Counter[int]] = defaultdict(Counter)
        self.costs: dict[tuple[int, int], set[int]] = defaultdict(set)
        kinds: list[tuple[int, Callable[[], Any]]] = [
            (8, self.ordinary),
            (3, self.bad_options),
            (3, self.bad_image),
            (2, self.gives_up),
            (1, self.leaves_a_stream),
            (1, self.too_many),
            (1, self.too_long),
            (1, self.refused_late),
            (1, self.unknown_uuid),
            (1, self.no_json),
            (1, self.preview),
            (1, self.thin),
        ]
        self.kinds, self.weights = [kind for _, kind in kinds], [weight for weight, _ in kinds]

    async def one(self) -> None:
        await self.draw.choices(self.kinds, self.weights)[0]()

    async def post(self, kind: str, body: object, path: str = "/v1/chat/completions", timeout: float = 300) -> Any:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **FRESH}
        response = await self.http.post(self.url + path, content=text, headers=headers, timeout=timeout)
        self.answers[kind][response.status_code] += 1
        return response.json() if response.status_code == 200 else None

    async def ordinary(self) -> None:
        image, options = self.draw.randrange(len(URLS)), self.draw.randrange(len(OPTIONS))
        found = await self.post("ordinary", chat(URLS[image], options=OPTIONS[options]))
        if found:
            self.costs[image, options].add(found["usage"]["prompt_tokens"])

    async def bad_options(self) -> None:
        await self.post("bad options", chat(self.draw.choice(URLS), options=self.draw.choice(BAD_OPTIONS)))

    async def bad_image(self) -> None:
        url, status = self.draw.choice([*self.bad_urls.items()])
        await self.post(f"bad image that stock vLLM answers with {status}", chat(self.draw.choice(URLS), url))

    async def gives_up(self) -> None:
        fresh = data_url(noise(self.draw.randrange(10**6), 64, 64))
        try:
            await self.post("gives up", chat(fresh, max_tokens=64), timeout=self.draw.uniform(0.01, 4))
        except httpx.TimeoutException:
            await self.post("tries again", chat(fresh))

    async def leaves_a_stream(self) -> None:
        body = chat(self.draw.choice(URLS), stream=True, max_tokens=64)
        async with self.http.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=300) as response:
            self.answers["leaves a stream"][response.status_code] += 1
            async for _ in response.aiter_lines():
                break

    async def too_many(self) -> None:
        await self.post("too many", chat(*self.draw.choices(URLS, k=5)))

    async def too_long(self) -> None:
        await self.post("too long", chat(*self.draw.choices(URLS, k=4), options={"energy": 1.0}))

    async def refused_late(self) -> None:
        await self.post("refused late", chat(self.draw.choice(URLS), logprobs=True, top_logprobs=20_000))

    async def unknown_uuid(self) -> None:
        body = chat()
        part = {"type": "image_url", "image_url": None, "uuid": f"unknown-{self.draw.random()}"}
        body["messages"][0]["content"].insert(0, part)
        await self.post("unknown uuid", body)

    async def no_json(self) -> None:
        await self.post("no JSON", json.dumps(chat(self.draw.choice(URLS))).encode()[:-2])

    async def preview(self) -> None:
        body = {"messages": chat(self.draw.choice(URLS))["messages"], "overlay": True}
        await self.post("preview", body, "/v1/eadaprune/preview")

    async def thin(self) -> None:
        await self.post("thin", chat(THIN, options=self.draw.choice(OPTIONS)))


def resident(server: Server) -> int:
    """MiB of all processes of a server."""
    front_end = psutil.Process(server.process.pid)
    processes = [front_end, *front_end.children(recursive=True)]
    return sum(process.memory_info().rss for process in processes) >> 20


async def storm(server: Server, requests: int, bad_urls: dict[str, int]) -> tuple[Client, list[int]]:
    """The client that sent so many, and how large the server was after each tenth of them."""
    sizes = []
    limits = httpx.Limits(max_connections=AT_A_TIME)
    async with httpx.AsyncClient(limits=limits) as http:
        client = Client(server, http, bad_urls)
        numbers = iter(range(requests))

        async def work() -> None:
            for number in numbers:
                if number % (requests // 10) == 0:
                    sizes.append(resident(server))
                await client.one()

        await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
    return client, [*sizes, resident(server)]


def test_ten_thousand_requests(start: Start, stock: Server) -> None:
    """Most of them odd: none is answered with a failure of the server, equal images under equal options cost the same,
    and memory stays where it is."""
    flags = ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--enforce-eager", "--dtype", DTYPE]
    # Little is remembered of images that come once: the last thousand leave no more behind than the ones before.
    flags += ["--limit-mm-per-prompt", '{"image": 4}', "--mm-processor-cache-gb", "0.02"]
    server = start("hostile", *flags)
    bad_urls = {url: stock.post("/v1/chat/completions", chat(URLS[0], url)).status_code for url in BAD_URLS}
    client, sizes = asyncio.run(storm(server, REQUESTS, bad_urls))
    for kind, answers in sorted(client.answers.items()):
        print(f"{kind}: {dict(answers)}")
    print(f"MiB after each thousand: {sizes}")
    assert server.process.poll() is None
    served = {"ordinary", "gives up", "tries again", "leaves a stream", "preview", "thin"}
    for kind, answers in client.answers.items():
        expected = {200} if kind in served else {400, 422}
        assert answers.keys() <= expected | {status for status in bad_urls.values() if str(status) in kind}, kind
    assert sum(map(len, client.costs.values())) == len(client.costs) > 300
    server.wait_until_idle()
    assert server.text_tokens("What?") > 0
    # After the caches are full, and all has been done at once that ever will be.
    assert sizes[-1] - sizes[7] < 40


def test_request_with_many_images_does_not_block_others(start: Start) -> None:
    """Though all of its images are encoded before it is found that their tokens are too many."""
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--dtype", DTYPE, "--limit-mm-per-prompt", '{"image": 999}']
    server = start("many", *flags)
    urls = [data_url(noise(seed, 2, 2)) for seed in range(999)]

    def encoded() -> float:
        return server.metric("eadaprune_stage_seconds_count", stage="encode")

    with ThreadPoolExecutor(1) as pool:
        body = chat(*urls, options={"energy": 1e-9, "min_tokens": 1})
        other = pool.submit(server.post, "/v1/chat/completions", body)
        eventually(encoded)
        assert server.post("/v1/chat/completions", chat(data_url(noise(1)))).status_code == 200
        assert not other.done()
        assert encoded() < len(urls) / 2
        other.result()
    assert encoded() == len(urls) + 1
