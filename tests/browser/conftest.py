"""One server and one browser for each of two people, shared by all browser tests of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.conftest import start_server
from tests.browser.chromium import MISSING, Browser
from tests.browser.site import Person, Traces, invite, superuser, train, user
from tests.server import Server
from tests.tiny_model import make_tiny_model

__all__ = ["start_server"]

DESKTOP, PHONE = 1440, 420
VIEWS = {
    "superuser, desktop, light": ("superuser", DESKTOP, False),
    "superuser, phone, dark": ("superuser", PHONE, True),
    "user, desktop, dark": ("user", DESKTOP, True),
    "user, phone, light": ("user", PHONE, False),
}
"""Every person at every width and in both colours, every width in both colours."""


@dataclass(frozen=True)
class Seat:
    """A person before their browser."""

    person: Person
    browser: Browser
    traces: Traces
    number: int
    """Tells the things that are made from this seat from those of the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the browser tests on a machine without a browser, and say so."""
    if MISSING:
        reason = f"needs {' and '.join(MISSING)}: apt-get install chromium chromium-driver"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def site(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server with a price, limits and patience."""
    return start_server(
        TINKERAPI_BASE_MODEL=str(make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")),
        TINKERAPI_DTYPE="float32",
        TINKERAPI_NUM_THREADS="1",
        TINKERAPI_GAP_SECONDS="86400",
        TINKERAPI_WORKER_HOUR_CENTS="250",
        TINKERAPI_USER_TOKENS_PER_DAY="1000000",
        TINKERAPI_USER_STORAGE_BYTES="1000000000",
    )


@pytest.fixture(scope="module")
def seats(
    site: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Person, Browser, Traces]]]:
    """Both people, logged in: the superuser by password, the user by an invitation."""
    people = {"superuser": superuser(site), "user": user(site, "ada")}
    with ExitStack() as opened:
        browsers = {}
        for name in people:
            browsers[name] = Browser(site.url, tmp_path_factory.mktemp("profile"))
            opened.callback(browsers[name].close)
            browsers[name].look(width=DESKTOP, dark=False)
        people["superuser"].log_in(browsers["superuser"])
        invite(browsers["superuser"], browsers["user"], people["user"])
        people["user"].log_in(browsers["user"])
        yield {name: (people[name], browsers[name], train(people[name])) for name in people}


@pytest.fixture(params=list(VIEWS))
def seat(
    request: pytest.FixtureRequest, seats: dict[str, tuple[Person, Browser, Traces]]
) -> Iterator[Seat]:
    """A person, a width and a theme. At the end the browser has nothing to complain of."""
    who, width, dark = VIEWS[request.param]
    person, browser, traces = seats[who]
    browser.look(width=width, dark=dark)
    yield Seat(person, browser, traces, list(VIEWS).index(request.param))
    assert browser.overflow() <= 0, f"{browser.driver.current_url} scrolls sideways"
    assert browser.complaints() == []
