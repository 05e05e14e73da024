"""Several renderer workers tokenize; images are still processed in the order in which they are sent."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Start
from harness import DTYPE, Server
from shared import Reference, noise

pytestmark = pytest.mark.slow
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    flags = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "16", "--enforce-eager", "--dtype", DTYPE]
    flags += ["--mm-processor-cache-gb", "0.002"]  # two megabytes: images are evicted and encoded again
    return start("renderers", *flags, "--renderer-num-workers", "4")


def test_new_and_equal_images_at_once(server: Server, reference: Reference) -> None:
    scenes = [noise(8500 + number, blocks=2 + number % 30) for number in range(60)]
    cases = [(number, energy) for number in range(60) for energy in (0.9, 0.97, 1.0)]
    text = server.text_tokens(QUESTION)

    def tokens(case: tuple[int, float]) -> int:
        number, energy = case
        return server.prompt_tokens(scenes[number], QUESTION, options={"energy": energy})

    def kept(number: int, energy: float) -> int:
        return 576 if energy == 1 else len(reference.kept(scenes[number], energy=energy))

    with ThreadPoolExecutor(16) as pool:
        counted = list(pool.map(tokens, [case for case in cases for _ in range(2)]))
        later = list(pool.map(tokens, cases[:30]))
    expected = [text + kept(*case) for case in cases]
    assert counted[::2] == counted[1::2] == expected
    assert later == expected[:30]
    server.wait_until_idle()
