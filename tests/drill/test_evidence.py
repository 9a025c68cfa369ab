"""One bit, one future, one file: each difference is found and named."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from tinkerapi.drill.evidence import Evidence, History, differences, incomplete

SAME = {
    "answers": {"a/0/forward_backward": '{"loss": 0.5}'},
    "futures": {"a 1 key": "forward_backward ready"},
    "checkpoints": {"a/training/final step 3 weights.safetensors": "00ff"},
}
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def test_equal_runs_differ_in_nothing() -> None:
    assert differences(Evidence(**SAME), Evidence(**SAME)) == []


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("change", ["another", "missing", "added"])
def test_a_difference_is_named(what: str, change: str) -> None:
    [(name, value)] = SAME[what].items()
    changed = {
        "another": {name: value + "x"},
        "missing": {},
        "added": {name: value, "one more": value},
    }[change]
    [sentence] = differences(Evidence(**SAME), Evidence(**{**SAME, what: changed}))
    assert sentence.startswith(f"{what}: {'one more' if change == 'added' else name}: ")


def test_runs_that_both_lost_something_do_not_pass_for_equal() -> None:
    assert incomplete(Evidence(**SAME), requests=1, failures=0) == []
    lost = {**SAME, "futures": {"a 1 key": "forward_backward failed CrashedWorker"}}
    sentences = incomplete(Evidence(**lost), requests=2, failures=0)
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        "answers",
        "futures",
        "failed futures",
    ]


def test_a_difference_at_the_end_of_a_long_answer_is_shown() -> None:
    long = {"a": 1000 * "0" + "1"}, {"a": 1000 * "0" + "2"}
    one, other = (Evidence(**{**SAME, "answers": answers}) for answers in long)
    [sentence] = differences(one, other)
    assert re.fullmatch(r"answers: a: unbroken \.\.\.0+1, broken \.\.\.0+2", sentence)
    assert len(sentence) < 200


def history(*results: tuple[float, float]) -> History:
    return History(workers=2, repeated=0, results=[(at(a), at(b)) for a, b in results])


def test_a_recovery_ends_with_the_first_result_of_a_later_worker() -> None:
    # A result that the dead worker had committed appears after its end, and does not count.
    assert history((0, 4.9), (0, 5.1), (7, 9), (7, 10)).recovery_seconds(at(5), None) == 4


def test_a_recovery_that_the_next_kill_cut_short_is_not_measured() -> None:
    assert history((0, 4.9), (7, 9)).recovery_seconds(at(5), at(8)) is None
    assert history((0, 4.9)).recovery_seconds(at(5), None) is None
