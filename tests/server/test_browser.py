"""The page at ``/eadaprune`` in a real browser."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from harness import KV_BYTES, Server
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from shared import Reference, program

from eadaprune_vllm.core.draw import data_url, png
from eadaprune_vllm.http.page import FILES

SENT = "requestWillBeSent"
Images = dict[str, Image.Image]
# What a browser does where files are dropped, or pasted.
HAND_OVER = """
const [event, name, type, url] = arguments;
const bytes = Uint8Array.from(atob(url.split(",")[1]), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, {type}));
const init = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
document.querySelector("#picture").dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, init));
"""
# The button's next words, however short they stand there: a slow machine asks too late.
NEXT_WORDS = """
const button = document.querySelector("#copy");
window.words = new Promise((done) => {
  new MutationObserver(() => done(button.textContent)).observe(button, {childList: true});
});
"""


@pytest.fixture
def browser(pruning: Server) -> Iterator[Browser]:
    with Browser(f"{pruning.url}/eadaprune") as browser:
        browser.wait("#model", has="demo")
        browser.until(browser.find("#copy").is_enabled)  # the server accepts its defaults
        yield browser


@pytest.fixture
def coffee(images: Images, tmp_path: Path) -> Path:
    """A file whose name a shell must not take apart."""
    file = tmp_path / "my $1 coffee's.png"
    file.write_bytes(png(images["coffee"]))
    return file


def starts(element: WebElement, text: str) -> bool:
    """Whether the text of an element, which may be hidden, starts so."""
    return str(element.get_property("textContent")).startswith(text)


def copied(browser: Browser, kind: str) -> str:
    """What is in the clipboard after the button."""
    browser.choose(kind)
    browser.run(NEXT_WORDS)
    browser.find("#copy").click()
    assert browser.run("return window.words") == "Copied"
    text = browser.run("return navigator.clipboard.readText()")
    browser.wait("#copy", is_not="Copied")
    assert text == browser.run("return document.querySelector('#text').textContent")
    return str(text)


def test_numbers_follow_the_slider_and_what_is_copied_does_the_same(
    browser: Browser, pruning: Server, reference: Reference, images: Images, coffee: Path, tmp_path: Path
) -> None:
    browser.picture(coffee)
    first = len(reference.kept(images["coffee"], energy=0.95))
    assert browser.wait("#kept") == str(first)  # the server's default
    assert [browser.text(f"#{name}") for name in ("threshold", "bound")] == ["0.95", "the minimum, 16 tokens"]
    held = browser.text("#spectral")
    assert (
        browser.text("#meaning")
        == f"min_tokens sets the budget: up to energy {held} the picture keeps these 16 tokens."
    )
    assert browser.find("#idle").size["width"] > 20  # beside the part of the slider that does nothing
    browser.press("#slider", Keys.END)
    assert browser.wait("#kept", is_not=str(first)) == "576"
    browser.press("#slider", *[Keys.PAGE_DOWN] * 4)
    kept = int(browser.wait("#kept", is_not="576"))
    energy = float(str(browser.find("#value").get_property("value")))
    assert 0.999 < energy < 0.9999
    assert kept == len(reference.kept(images["coffee"], energy=energy))
    assert [browser.text(f"#{name}") for name in ("threshold", "bound")] == [f"{energy:g}", "the threshold"]
    assert (browser.text("#meaning"), browser.find("#idle").size["width"]) == ("", 0)
    assert browser.text("#of") == "of 576 tokens kept"
    assert browser.text("#share") == f"{100 * kept / 576:.1f} %"
    assert browser.text("#bytes").startswith(f"{int((576 - kept) * KV_BYTES / 1024 + 0.5)} KiB of ")
    assert browser.run("return [shown.naturalWidth, shown.naturalHeight]") == [336, 336]
    assert str(browser.find("#curve").get_attribute("aria-label")).endswith(f" at {kept} of 576")

    browser.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    curl = copied(browser, "curl").replace("curl ", f"{program('curl')} --silent ", 1)
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["eadaprune"]["kept_tokens"] == kept
    python = copied(browser, "python")
    printed = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    prompt = pruning.prompt_tokens(images["coffee"], "What is in the picture?", options={"energy": energy})
    assert printed.stdout.split()[-1] == str(prompt), printed.stderr
    assert copied(browser, "flags") == f"vllm serve MODEL --plugin eadaprune --eadaprune-energy {energy:g}"

    screenshot = tmp_path / "page.png"
    browser.driver.save_screenshot(str(screenshot))
    assert len(Image.open(screenshot).convert("RGB").getcolors(1 << 24) or []) > 1000  # a photograph is in it
    requested = {sent["request"]["url"].removeprefix(pruning.url).partition(",")[0] for sent in browser.network(SENT)}
    requested.discard("data:image/svg+xml")  # the icon, which some ask for
    pictures = {"data:image/png;base64", "data:image/jpeg;base64"}  # as they are chosen, and as they are drawn
    samples = {path for path in requested if path.startswith("/eadaprune/") and path.endswith((".jpg", ".png"))}
    code = {f"/eadaprune/{name}" for name in FILES if name.endswith((".css", ".js"))}
    assert len(samples) == 6
    assert requested - samples - code == {"/eadaprune", "/v1/eadaprune/config", "/v1/eadaprune/preview"} | pictures
    assert code < requested
    assert browser.complaints() == []


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(browser: Browser, reference: Reference, images: Images, event: str) -> None:
    browser.run(HAND_OVER, event, "moon.png", "image/png", data_url(images["moon"]))
    assert browser.wait("#kept") == str(len(reference.kept(images["moon"], energy=0.95)))
    assert browser.text("#name").startswith("moon.png, ")
    browser.run(HAND_OVER, event, "moon.txt", "text/plain", "data:text/plain;base64,bW9vbg==")
    assert browser.wait("#problem") == "moon.txt is not a picture."


def test_files_that_are_no_pictures_leave_the_picture_alone(browser: Browser, coffee: Path, tmp_path: Path) -> None:
    browser.picture(coffee)
    kept, shown = browser.wait("#kept"), browser.find("#shown").get_attribute("src")
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for name, text in (("notes.jpg", "Not a picture."), ("drawing.svg", drawing), ("empty.png", "")):
        (tmp_path / name).write_text(text)
        browser.picture(tmp_path / name)
        problem = browser.wait("#problem", has=f"{name}: ")
        assert "an image or video could not be read: " in problem
        assert "<" not in problem  # no object of Python
        assert browser.text("#kept") == kept
        assert browser.find("#shown").get_attribute("src") == shown
        assert browser.text("#name").startswith(coffee.name)


def test_pictures_that_only_the_server_can_read(
    browser: Browser, reference: Reference, images: Images, tmp_path: Path
) -> None:
    images["moon"].save(tmp_path / "moon.tiff")
    browser.picture(tmp_path / "moon.tiff")
    assert browser.wait("#kept") == str(len(reference.kept(images["moon"], energy=0.95)))
    assert browser.text("#name").startswith("moon.tiff, ")
    assert browser.run("return shown.naturalWidth") == 336


def test_samples_and_two_values_side_by_side(browser: Browser) -> None:
    assert browser.text("#kinds").count("%") == 6  # what the server keeps of each kind, and on average
    browser.find("#samples button").click()
    first = browser.wait("#kept")
    assert browser.text("#name").startswith("photograph-astronaut.jpg, ")
    assert not browser.find("#kinds").is_displayed()
    browser.find("#pin").click()
    pinned, image = browser.text("#pinned .caption"), browser.find("#pinned img").get_attribute("src")
    assert pinned == browser.text("#caption") == f"energy 0.95: {first} of 576"
    browser.press("#slider", Keys.END)
    assert browser.wait("#caption", is_not=pinned) == "energy 1: 576 of 576"
    assert browser.text("#pinned .caption") == pinned
    assert browser.find("#pinned img").get_attribute("src") == image != browser.find("#shown").get_attribute("src")
    marks = browser.driver.find_elements("css selector", "#curve text.other, #curve text.at")
    assert [mark.text for mark in marks] == [first, "576"]
    browser.find("#pin").click()
    assert not browser.find("#pinned").is_displayed()


def test_a_question_is_answered_with_and_without_pruning(
    browser: Browser, pruning: Server, images: Images, coffee: Path
) -> None:
    assert not browser.find("#asking").is_displayed()  # there is no picture to ask about
    browser.picture(coffee)
    browser.wait("#kept")
    browser.find("#question").clear()
    browser.press("#question", "Is it hot?", Keys.ENTER)
    browser.until(lambda: browser.text("#answers").count(" tokens in the prompt") == 2)
    every, pruned = (pruning.prompt_tokens(images["coffee"], "Is it hot?", options={"energy": e}) for e in (1.0, 0.95))
    whole, few = browser.driver.find_elements("css selector", "#answers article")
    assert whole.text.startswith("Every token\n")
    assert whole.text.endswith(f"\n{every} tokens in the prompt")
    assert few.text.startswith("Pruned, energy 0.95\n")
    assert few.text.endswith(f"\n{pruned} tokens in the prompt")
    browser.find("#samples button").click()
    browser.until(lambda: browser.text("#answers") == "")  # they were about the other picture


def test_targets_have_the_range_that_the_server_says(browser: Browser, pruning: Server, coffee: Path) -> None:
    browser.picture(coffee)
    browser.choose("target")
    for key in (Keys.HOME, Keys.END):
        browser.press("#slider", key)
        expected = f"target {browser.find('#value').get_property('value')}:"
        browser.until(partial(starts, browser.find("#caption"), expected))
    browser.choose("flags")
    # A server's own targets end before; the threshold does the same there.
    assert browser.text("#text").endswith(f" --eadaprune-energy {browser.text('#threshold')}")


def test_rejections_have_the_servers_message(browser: Browser, coffee: Path) -> None:
    browser.picture(coffee)
    browser.wait("#kept")
    before = browser.text("#text")
    browser.find("#value").clear()
    browser.press("#value", "1.5")
    browser.wait(
        "#problem", has="eadaprune.energy=1.5 is not allowed; it must be a number greater than 0 and at most 1"
    )
    assert browser.text("#text") == before  # no request that would be rejected
    assert not browser.find("#copy").is_enabled()
    browser.find("#default").click()
    browser.until(lambda: not browser.find("#problem").is_displayed())
    assert browser.find("#copy").is_enabled()
    browser.find("#value").clear()
    browser.press("#value", "0.999728")
    browser.until(lambda: browser.text("#threshold") == "0.999728")
    # The whole number is seen.
    assert browser.run("const value = document.querySelector('#value'); return value.scrollWidth <= value.clientWidth")


def test_long_decisions_say_that_they_take_long(browser: Browser, coffee: Path) -> None:
    slow: dict[str, Any] = {"offline": False, "latency": 4000, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.driver.execute_cdp_cmd("Network.enable", {})
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    browser.picture(coffee)
    browser.wait("#progress", has="The server encodes and decides: 2 s")
    browser.wait("#kept")
    assert not browser.find("#progress").is_displayed()


def test_outdated_requests_are_cancelled(browser: Browser, coffee: Path) -> None:
    browser.picture(coffee)
    browser.wait("#kept")
    browser.driver.execute_cdp_cmd("Network.enable", {})
    # Longer than it takes to send the next.
    slow: dict[str, Any] = {"offline": False, "latency": 10_000, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)

    def previews() -> list[dict[str, Any]]:
        return [sent for sent in browser.network(SENT) if sent["request"]["url"].endswith("/preview")]

    def ask_anew() -> None:
        before = len(previews())
        browser.press("#slider", *[Keys.ARROW_RIGHT] * 10)  # one request for all
        browser.until(lambda: len(previews()) > before)

    for _ in range(3):
        ask_anew()
    browser.wait("#threshold", has=str(browser.find("#value").get_property("value")))
    sent = previews()
    assert len(sent) == 5  # the first one without a picture
    cancelled = [failed["requestId"] for failed in browser.network("loadingFailed") if failed["canceled"]]
    assert cancelled == [each["requestId"] for each in sent[2:4]]
