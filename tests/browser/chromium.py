"""A person's browser: Chromium, driven through its own driver.

It keeps what a person would not see: errors in its log, requests to other hosts, and the faults
that axe finds. Every wait ends when the page shows what was waited for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from selenium.common.exceptions import JavascriptException, WebDriverException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from tests.waiting import LONG_SECONDS

Found = TypeVar("Found")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = [
    name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None
]
"""Programs that the tests need and this machine lacks."""

_AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # refused to root, who runs the tests in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--force-prefers-reduced-motion",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
)
_PAUSE_SECONDS = 0.05

# The first visible element of a selector whose text has some words.
_FIND = """
const [selector, words] = arguments;
return [...document.querySelectorAll(selector)].find((one) =>
  one.checkVisibility({ visibilityProperty: true }) && one.getClientRects().length
  && one.textContent.replace(/\\s+/g, " ").includes(words)) || null;
"""
_FAULTS = """
const done = arguments[arguments.length - 1];
document.getAnimations().filter((one) => one.effect.getTiming().iterations < Infinity)
  .forEach((one) => one.finish());
axe.run({ resultTypes: ["violations"] }).then((found) => done(found.violations
  .filter((one) => one.impact === "serious" || one.impact === "critical")
  .flatMap((one) => one.nodes.map((node) =>
    `${one.id}: ${node.html.slice(0, 200)} ${node.failureSummary}`))));
"""
_THEME = """
const [theme] = arguments;
if (window.Alpine) Alpine.$data(document.documentElement).adminTheme = theme;
"""
_OVERFLOW = """
return document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


class Browser:
    """One window of one person."""

    def __init__(self, url: str, profile: Path) -> None:
        """``url``: the server's, without a slash at its end; ``profile``: an empty folder."""
        options = ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.url = url
        self.driver = Chrome(options=options, service=ChromeService(DRIVER))
        self.driver.set_page_load_timeout(LONG_SECONDS)
        self.driver.set_script_timeout(LONG_SECONDS)

    def close(self) -> None:
        self.driver.quit()

    def look(self, *, width: int, dark: bool) -> None:
        """Give the window a width in pixels, and the person's choice of colours."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        theme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_script(_THEME, theme)

    # --- reading ----------------------------------------------------------------------------

    def open(self, path: str) -> None:
        """Go to a page of the server."""
        self.driver.get(self.url + path)

    @property
    def path(self) -> str:
        """The address of the page without the server's, without what follows a question mark."""
        return urlsplit(self.driver.current_url).path

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def until(self, look: Callable[[], Found | None], what: str) -> Found:
        """The result of ``look`` once there is one; a page that changes meanwhile is read again."""
        deadline = time.monotonic() + LONG_SECONDS
        while True:
            try:
                found = look()
            except WebDriverException as problem:  # the page changed, or something lies above it
                if isinstance(problem, JavascriptException):
                    raise
                found = None
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} on {self.driver.current_url}:\n{self.text()}")
            time.sleep(_PAUSE_SECONDS)

    def find(self, selector: str, words: str = "") -> WebElement:
        """The first visible element of a CSS selector whose text has these words."""
        return self.until(
            lambda: self.driver.execute_script(_FIND, selector, words), f"{selector} {words!r}"
        )

    def number(self, selector: str) -> int:
        """How many elements the page has of a CSS selector."""
        return len(self.driver.find_elements("css selector", selector))

    def sees(self, words: str) -> None:
        """Wait until the page shows these words."""
        self.until(lambda: words in self.text(), f"{words!r}")

    # --- acting -----------------------------------------------------------------------------

    def click(self, selector: str, words: str = "") -> None:
        """Click on the first visible element of a CSS selector whose text has these words."""

        def done() -> bool:
            one = self.driver.execute_script(_FIND, selector, words)
            if one is None:
                return False
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
            one.click()
            return True

        self.until(done, f"{selector} {words!r} to click on")

    def press(self, words: str) -> None:
        """Press a button at the head of a page; a narrow window keeps them in a menu."""
        opened: set[str] = set()

        def done() -> bool:
            one = self.driver.execute_script(_FIND, "#header-inner a", words)
            if one is not None:
                one.click()
                return True
            menu = self.driver.execute_script(_FIND, "#header-inner a", "more_horiz")
            if menu is not None and self.driver.current_url not in opened:
                opened.add(self.driver.current_url)
                menu.click()
            return False

        self.until(done, f"button {words!r}")

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field."""

        def done() -> bool:
            field = self.driver.execute_script(_FIND, selector, "")
            if field is None:
                return False
            field.clear()
            field.send_keys(text)
            return True

        self.until(done, f"{selector} to fill in")

    def submit(self, selector: str, text: str) -> None:
        """Fill in a field, press Enter, and wait until the answer is there: what is looked for
        next may also be on the page before."""
        self.fill(selector, text)
        self.driver.execute_script("window.isBefore = true")
        self.find(selector).send_keys(Keys.ENTER)
        self.until(
            lambda: not self.driver.execute_script("return window.isBefore"), f"answer to {text!r}"
        )

    def choose(self, selector: str, words: str) -> None:
        """Choose the first option of a list whose text has these words."""
        chosen = Select(self.find(selector))
        option = next(one for one in chosen.options if words in one.get_attribute("textContent"))
        chosen.select_by_value(option.get_attribute("value") or "")

    def point_at(self, selector: str, look: Callable[[], Found | None], what: str) -> None:
        """Move the mouse over an element until ``look`` finds what that shows."""

        def done() -> bool:
            one = self.driver.execute_script(_FIND, selector, "")
            if one is None:
                return False
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
            ActionChains(self.driver, duration=0).move_to_element(one).perform()
            return bool(look())

        self.until(done, what)

    # --- what a person would not see ----------------------------------------------------------

    def faults(self) -> list[str]:
        """The serious and critical accessibility faults of the page as it is now."""
        if not self.driver.execute_script("return Boolean(window.axe)"):
            self.driver.execute_script(_AXE)
        found: list[str] = self.driver.execute_async_script(_FAULTS)
        return found

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.driver.execute_script(_OVERFLOW))

    def complaints(self) -> list[str]:
        """Errors of scripts and of the content policy, failed requests, and requests to other
        hosts, since the last call."""
        log: list[dict[str, Any]] = self.driver.get_log("browser")
        errors = [entry["message"] for entry in log if entry["level"] == "SEVERE"]
        host = urlsplit(self.url).netloc
        return errors + [url for url in self._requested() if urlsplit(url).netloc != host]

    def _requested(self) -> list[str]:
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
