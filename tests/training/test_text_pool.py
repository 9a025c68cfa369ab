"""Text is tokenized in separate processes: a slow one is ended and delays nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from futures.payload import encode
from tests.training.odd_text import OddText
from tests.waiting import LONG_SECONDS, wait_for
from training.errors import LimitExceeded, TrainingError
from training.kinds import Sample
from training.types import Datum, SamplingParams
from training.worker import text_pool
from training.worker.text_pool import BYTES_TOGETHER, MOST_PROCESSES, TextPool
from training.worker.text_process import Answer, TextTask


def task(*prompts: str, seconds: float = 30.0, most: int = 1000) -> TextTask:
    request = Sample(prompts=prompts, num_samples=1, sampling_params=SamplingParams())
    return TextTask(
        request.kind, encode(request.to_payload()), max_context_tokens=most, seconds=seconds
    )


Run = Callable[..., dict[str, Answer]]


@pytest.fixture
def pool() -> Iterator[TextPool]:
    made = TextPool(OddText())
    yield made
    made.close()


@pytest.fixture
def answers(pool: TextPool) -> Run:
    def wait(*keys: str) -> dict[str, Answer]:
        got: dict[str, Answer] = {}
        deadline = time.monotonic() + LONG_SECONDS
        while not got.keys() >= set(keys):
            assert time.monotonic() < deadline, f"only {list(got)}"
            got |= pool.answers(wait_seconds=1.0)
        return {key: _plain(answer) for key, answer in got.items()}

    return wait


def _plain(answer: Answer) -> Any:
    if isinstance(answer, TrainingError):
        return answer
    return [item.tokens.tolist() for item in answer if not isinstance(item, Datum)]


def test_prompts_become_tokens_in_order(pool: TextPool, answers: Run) -> None:
    pool.submit("a", "ada", task("hi", "ho"))
    assert answers("a")["a"] == [list(b"hi"), list(b"ho")]
    assert pool.num_pending == 0


def test_a_refusal_is_the_requests_answer(pool: TextPool, answers: Run) -> None:
    pool.submit("a", "ada", task("hi", "refuse this"))
    pool.submit("b", "ada", task("long", most=3))
    refused = answers("a", "b")
    assert [str(refused[key]) for key in "ab"] == [
        "prompt[1]: this",
        "prompt: 4 tokens leave no room in the context: this model's maximum context length is 3 "
        "tokens",
    ]


def test_what_takes_too_long_fails_alone_and_by_name(pool: TextPool, answers: Run) -> None:
    pool.submit("slow", "ada", task("hi", "forever", seconds=0.5))
    pool.submit("behind", "ada", task("hi"))
    got = answers("slow", "behind")
    assert isinstance(got["slow"], LimitExceeded)
    assert "more than 0.5 seconds" in str(got["slow"])
    assert got["behind"] == [list(b"hi")]


def test_another_owner_does_not_wait_and_one_owner_has_one_process(
    pool: TextPool, answers: Run
) -> None:
    for number in range(3):
        pool.submit(f"slow{number}", "eve", task("forever"))
    pool.submit("b", "bob", task("hi"))
    assert answers("b")["b"] == [list(b"hi")]
    assert pool.num_pending == 3
    pool.forget("slow0")
    assert pool.num_pending == 2


def test_small_tasks_of_an_owner_are_done_without_a_look_after_each(
    pool: TextPool, answers: Run, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    pool.submit("first", "ada", task("hi"))
    for number in range(40):
        pool.submit(f"k{number}", "ada", task("hi"))
    pool.submit("last", "ada", task(f"touch {note}"))
    assert answers("first").keys() == {"first"}
    wait_for(note.exists)
    keys = [f"k{number}" for number in range(40)]
    assert set(keys) <= pool.answers().keys()
    assert pool.num_pending <= 1


def test_one_that_ends_its_process_takes_no_other_with_it(pool: TextPool, answers: Run) -> None:
    keys = ["before", "crash", "after", "late", "last"]
    texts = ["hi", "crash", "ho", "forever", "he"]
    pool.submit("first", "ada", task("hi"))
    for key, text in zip(keys, texts, strict=True):
        pool.submit(key, "ada", task(text, seconds=0.5 if text == "forever" else 30.0))
    got = answers("first", *keys)
    assert [got[key] for key in ("before", "after", "last")] == [
        [list(b"hi")],
        [list(b"ho")],
        [list(b"he")],
    ]
    assert "ended, twice" in str(got["crash"])
    assert isinstance(got["late"], LimitExceeded)


def test_a_task_that_was_sent_with_others_can_be_forgotten(
    pool: TextPool, answers: Run, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    pool.submit("first", "ada", task("hi"))
    for key, text in {"a": f"touch {note}", "b": "forever", "c": "ho", "d": "he"}.items():
        pool.submit(key, "ada", task(text))
    answers("first")
    wait_for(note.exists)
    pool.forget("c")
    assert answers("a")["a"] == [list(f"touch {note}".encode())]
    assert pool.num_pending == 2
    pool.forget("b")
    assert answers("d") == {"d": [list(b"he")]}
    assert pool.num_pending == 0


def test_large_tasks_are_sent_alone(pool: TextPool, answers: Run) -> None:
    size = 10 * BYTES_TOGETHER
    pool.submit("first", "ada", task("forever", seconds=0.5))
    for number in range(5):
        pool.submit(f"k{number}", "ada", task("x" * size, most=size))
    got = answers(*(f"k{number}" for number in range(5)))
    assert all(got[f"k{number}"] == [[ord("x")] * size] for number in range(5))


def test_more_owners_than_processes_take_turns(pool: TextPool, answers: Run) -> None:
    keys = [f"k{number}" for number in range(MOST_PROCESSES + 4)]
    for key in keys:
        pool.submit(key, f"owner {key}", task(key))
    assert answers(*keys) == {key: [list(key.encode())] for key in keys}


def test_a_process_that_somebody_ended_is_tried_again_once(
    pool: TextPool, answers: Run, tmp_path: Any
) -> None:
    pool.submit("once", "ada", task(f"crash-once {tmp_path / 'note'}"))
    pool.submit("always", "bob", task("crash"))
    got = answers("once", "always")
    assert isinstance(got["once"], list)
    assert isinstance(got["always"], TrainingError)
    assert "ended, twice (exit code -9)" in str(got["always"])


def test_memory_beyond_the_limit_fails_the_request(pool: TextPool, answers: Run) -> None:
    pool.submit("a", "ada", task("memory"))
    pool.submit("b", "ada", task("hi"))
    got = answers("a", "b")
    assert isinstance(got["a"], LimitExceeded)
    assert "more memory" in str(got["a"])
    assert got["b"] == [list(b"hi")]


def test_tasks_wait_for_the_first_process_to_start_and_share_it(
    pool: TextPool, answers: Run, tmp_path: Path
) -> None:
    pool.warm_up(tmp_path)
    pool.submit("a", "ada", task("hi"))
    assert answers("a")["a"] == [list(b"hi")]
    assert len(pool._processes) == 1
    pool.submit("b", "bob", task("ho"))
    assert answers("b")["b"] == [list(b"ho")]
    assert len(pool._processes) == 1


def test_a_pool_may_be_closed_while_its_first_process_starts(tmp_path: Path) -> None:
    pool = TextPool(OddText())
    pool.warm_up(tmp_path)
    pool.close()
    assert not pool._processes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_first_process_that_could_not_start_is_tried_again_with_the_first_task(
    pool: TextPool, answers: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no process")

    monkeypatch.setattr(text_pool, "_run_server", fail)
    pool.warm_up(tmp_path)
    pool.submit("a", "ada", task("hi"))
    assert answers("a")["a"] == [list(b"hi")]
