"""A real browser without a window, and the page in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from shared import program

SECONDS = 60


class Browser:
    """Debian's Chromium, with a profile of its own.

    Args:
        url: of the page; it is opened.
    """

    def __init__(self, url: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = program("chromium")
        # Without its sandbox, as CI runs it as root.
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,800"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._network: list[dict[str, Any]] = []
        self.driver = webdriver.Chrome(options, Service(program("chromedriver")))
        self.driver.get(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def find(self, selector: str) -> WebElement:
        """The element, seen or not."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function of that body returns."""
        return self.driver.execute_script(script, *arguments)

    def press(self, selector: str, *keys: str) -> None:
        """As on a keyboard, where the element has the focus."""
        self.find(selector).send_keys(*keys)

    def choose(self, value: str) -> None:
        """The radio button of that value, by its label."""
        self.find(f"label:has([value={value}])").click()

    def until(self, condition: Callable[[], Any]) -> None:
        """Waits for it."""
        WebDriverWait(self.driver, SECONDS).until(lambda _: condition())

    def wait(self, selector: str, is_not: str = "", has: str = "") -> str:
        """The element's text, as soon as it is another than ``is_not`` and has ``has`` in it."""
        self.until(lambda: self.text(selector) != is_not and has in self.text(selector))
        return self.text(selector)

    def network(self, event: str) -> list[dict[str, Any]]:
        """All events of that name since the browser started, as DevTools tell them."""
        self._network += [json.loads(message)["message"] for message in self._log("performance")]
        return [each["params"] for each in self._network if each["method"] == f"Network.{event}"]

    def complaints(self) -> list[str]:
        """What the browser logged since the last call."""
        return self._log("browser")

    def _log(self, name: str) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log(name)]  # type: ignore[no-untyped-call]

    def picture(self, file: Path) -> None:
        """The picture, through the chooser."""
        self.press("#file", str(file))
