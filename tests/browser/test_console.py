"""What people do in the console, in a real browser: as a superuser and as an ordinary user, on a
desktop and on a phone, in both colours."""

from __future__ import annotations

import pytest
import requests

from tests.browser.chromium import Browser
from tests.browser.conftest import DESKTOP, PHONE, Seat
from tests.browser.crawl import pages
from tests.browser.site import ANSWER, Person, Traces
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.acceptance

RUNS = "/admin/training/run/"
FUTURES = "/admin/futures/future/"
KEYS = "/admin/tinkerapi/apikey/"
CHECKPOINTS = "/admin/training/checkpoint/"


def open_run(seat: Seat, name: str, tab: str = "Overview", *, words: str = "") -> None:
    """A tab of a run's page, found in the list by its name or by other words."""
    browser = seat.browser
    browser.open(RUNS)
    browser.submit("#searchbar", words or name)
    browser.click("#result_list th a", name)
    if tab != "Overview":
        browser.click(".console-tabs a", tab)


def tick(seat: Seat, *rows: str) -> None:
    """Choose rows of a list by words in them."""
    for words in rows:
        row = seat.browser.find("#result_list tr.data-row", words)
        box = row.find_element("css selector", ".action-checkbox input")
        seat.browser.until(lambda box=box: box.click() or True, f"a box for {words}")


def run_action(seat: Seat, words: str) -> None:
    """Do something with the chosen rows of a list."""
    seat.browser.choose("select[name=action]", words)
    seat.browser.click("#changelist-actions button", "Run")


def steps_shown(seat: Seat) -> int:
    """The steps of a run, on its page."""
    return int(seat.browser.find("#run-status dl div", "Steps").text.split()[-1])


def facts_of_token(seat: Seat) -> str:
    """What is said of the token under the mouse."""
    return seat.browser.find("[data-part=facts]").text


def coloured(seat: Seat) -> str:
    """The text of the tokens that have a colour."""
    script = """return [...document.querySelectorAll(".console-token")]
        .filter((one) => one.style.backgroundColor).map((one) => one.textContent).join("")"""
    return str(seat.browser.driver.execute_script(script))


def test_a_run_is_named_and_found_by_its_name(seat: Seat) -> None:
    browser, name = seat.browser, f"Haiku number {seat.number}"
    open_run(seat, seat.traces.run)
    browser.press("Name")
    browser.fill("#modal-content input[name=title]", name)
    browser.fill("#modal-content textarea[name=notes]", f"{seat.number}: five, seven, five")
    browser.click("#modal-content button", "Save")
    browser.sees(f"{seat.number}: five, seven, five")

    open_run(seat, name, words=name.lower())

    browser.sees(name)
    browser.sees("4 steps")


def test_a_curve_grows_while_it_is_looked_at(seat: Seat) -> None:
    browser, run = seat.browser, seat.traces.other
    open_run(seat, run)
    chart = "#curves figure"
    browser.find(f"{chart}:has(canvas)", "Loss")
    browser.driver.execute_script("window.isStillOpen = true")
    steps = browser.until(lambda: steps_shown(seat), "number of steps")

    loss = seat.person.train(run)

    browser.until(lambda: f"{loss:.4g}" in browser.find(chart, "Loss").text, f"point of {loss:.4g}")
    browser.until(lambda: steps_shown(seat) == steps + 1, f"{steps + 1} steps")
    assert browser.driver.execute_script("return window.isStillOpen")
    browser.point_at(
        f"{chart} canvas", lambda: "step " in browser.find(chart).text, "number under the mouse"
    )


def test_a_rollout_is_opened_and_read(seat: Seat) -> None:
    browser = seat.browser
    open_run(seat, seat.traces.run, "Rollouts")
    browser.submit("input[name=q]", "the word")
    browser.click(".console-rollout-prompt", "The word?")
    browser.sees("2 completions from step 4")

    browser.click(".console-rollout-text")

    browser.point_at(
        ".console-token",
        lambda: "sampler's log-probability" in facts_of_token(seat),
        "token with its numbers",
    )


def test_the_tokens_that_were_trained_are_seen(seat: Seat) -> None:
    browser = seat.browser
    open_run(seat, seat.traces.run, "Data")
    browser.sees("· failed")  # the newest request
    browser.click("a", "earlier request")
    browser.click("button", "tokens before")

    assert ANSWER in coloured(seat)
    assert "word" not in coloured(seat)
    browser.point_at(
        ".console-token[style*=rgb]", lambda: "weight\n1" in facts_of_token(seat), "weight of 1"
    )


def test_two_runs_are_compared(seat: Seat) -> None:
    browser = seat.browser
    browser.open(f"{RUNS}?q={seat.person.name}-")
    tick(seat, seat.traces.run, seat.traces.other)
    run_action(seat, "Compare selected runs")

    browser.find(".console-curve canvas")
    assert browser.number(".console-legend li") == 2
    losses = browser.find(".console-curve", "Loss").find_elements(
        "css selector", ".console-curve-value span"
    )
    assert len(losses) == 2
    assert "4" in (different := browser.find(".console-compare tr.is-other", "Rank").text)
    assert "8" in different
    assert browser.faults() == []


def test_two_checkpoints_answer_the_same_message(seat: Seat) -> None:
    browser, run = seat.browser, seat.traces.run
    open_run(seat, run, "Checkpoints")
    browser.click("td a", "second")
    browser.press("Try it")
    browser.choose("select[name=model_b]", "first")
    browser.fill("input[name=max_tokens]", "6")
    browser.fill("textarea[name=prompt]", "And now?")
    browser.click("button", "Send")

    for side in ("a", "b"):
        turns = f"[data-side={side}] .console-play-turns"
        browser.find(f"{turns} .console-play-note a", "request")
        browser.find(f"{turns} li.is-user", "And now?")
        browser.find(f"{turns} li.is-assistant .console-token")
    browser.point_at(
        "[data-side=b] .console-token", lambda: "%" in facts_of_token(seat), "probability"
    )
    assert browser.faults() == []


def test_a_wait_is_explained(seat: Seat) -> None:
    browser = seat.browser
    open_run(seat, f"novel of {seat.person.name}", "Requests")
    browser.click("td a", "9")

    browser.sees("The request with seq_id 1 has not arrived, and this one must run after it.")


def test_a_failure_is_explained(seat: Seat) -> None:
    browser = seat.browser
    browser.open("/admin/")
    browser.click("a", seat.traces.failed.removeprefix("future_")[:8])

    browser.until(lambda: browser.path.startswith(FUTURES), "page of the request")
    browser.sees("999999")
    browser.sees("FAILED")


def test_a_key_is_rotated(seat: Seat) -> None:
    browser = seat.browser
    browser.open(f"{KEYS}?q=laptop+of+{seat.person.name}")
    browser.click("#result_list .data-row a")
    browser.press("Rotate")
    browser.fill("#modal-content input[name=overlap_hours]", "1")
    assert browser.faults() == []
    browser.click("#modal-content button", "Make its successor")

    key = browser.find("#new-key").text.strip()
    for valid in (key, seat.person.key):
        answer = requests.get(
            f"{browser.url}/api/v1/adapters", headers={"X-API-Key": valid}, timeout=LONG_SECONDS
        )
        assert answer.status_code == 200


def test_disk_is_freed(seat: Seat) -> None:
    browser, names = seat.browser, [f"spare-{seat.number}-{letter}" for letter in "ab"]
    for name in names:
        seat.person.save(seat.traces.other, name)
    browser.open(f"{CHECKPOINTS}storage/")
    browser.sees("snapshots of live models")
    browser.click("a", "list of checkpoints")
    tick(seat, *names)
    run_action(seat, "Delete selected checkpoints")
    browser.sees("Delete 2 checkpoints and free ")

    browser.click("button", "Delete them")

    browser.sees("2 checkpoints deleted, ")
    assert all(name not in browser.text() for name in names)


def test_a_run_is_replayed(seat: Seat) -> None:
    browser, run = seat.browser, f"to-replay-{seat.number}"
    seat.person.train(run)
    open_run(seat, run)
    browser.press("Replay")
    browser.click("#modal-content button", "Replay it")

    browser.sees("Equal to the last bit")


@pytest.mark.parametrize(
    ("who", "views"),
    [("superuser", [(DESKTOP, False), (PHONE, True)]), ("user", [(PHONE, False)])],
)
def test_every_page_is_accessible_and_fits_a_phone(
    seats: dict[str, tuple[Person, Browser, Traces]], who: str, views: list[tuple[int, bool]]
) -> None:
    """No page has a serious or critical fault by axe, or scrolls sideways."""
    _, browser, traces = seats[who]
    first = [f"{FUTURES}{traces.waiting}/change/", f"{FUTURES}{traces.failed}/change/"]
    first += ["/", "/docs/", "/docs/curves"] if who == "user" else []
    faults: dict[str, list[str]] = {}
    for address in pages(browser, *first):
        for width, dark in views:
            browser.look(width=width, dark=dark)
            found = browser.faults()
            if browser.overflow() > 0:
                found.append(f"scrolls sideways at {width}")
            if found:
                faults[f"{address} at {width}{' dark' if dark else ''}"] = found

    assert faults == {}
    assert browser.complaints() == []
