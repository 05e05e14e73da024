"""A real browser without a window, and the page in it."""

import json
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

    def wait(self, selector: str, is_not: str = "", has: str = "") -> str:
        """The element's text, as soon as it is another than ``is_not`` and has ``has`` in it."""

        def met(_: object) -> str | None:
            text = self.text(selector)
            return text if text != is_not and has in text else None

        text = WebDriverWait(self.driver, SECONDS).until(met)
        assert text
        return text

    def requested(self) -> list[str]:
        """The URLs of all requests since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the browser logged since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, file: Path) -> None:
        """The picture, through the chooser."""
        self.press("#file", str(file))
