"""The training, fixed by a seed before the server starts.

A trainee is one adapter with its own client. Its steps are those of a training loop:
gradients in one to three requests, some refused for a bad token, an optimizer step, samples of
the live weights and of kept ones, checkpoints with the optimizer, and loading one of them.
Every result must depend only on the requests, so each has its own seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Style = Literal["waiting", "futures", "numbered"]
"""The kind of client: waits for each result; submits a step and fetches its futures; or
numbers its requests as the tinker SDK does."""

STYLES: tuple[Style, ...] = ("waiting", "futures", "numbered")
RANKS = (4, 16, 8, 2, 32, 8)
BAD_TOKEN = 2**30  # in no vocabulary: the request fails and changes nothing
TEXT_TOKENS = (5, 200)  # ids that every model has and that are not special
MOST_TOKENS = 40  # of a datum


@dataclass(frozen=True, kw_only=True)
class Datum:
    """Tokens, target tokens and their weights."""

    tokens: list[int]
    targets: list[int]
    weights: list[float]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, independent of dialects."""

    name: str
    """Unique in the job: the Idempotency-Key, if there is one."""
    kind: str
    """``create``, ``forward_backward``, ``optim_step``, ``sample``, ``save``, ``load``,
    ``keep`` (weights to sample from) or ``sample_kept``."""
    fields: dict[str, Any]

    @property
    def must_fail(self) -> bool:
        """Whether its data are invalid."""
        return any(BAD_TOKEN in datum.targets for datum in self.fields.get("data", ()))


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """One adapter, and its requests, step by step."""

    name: str
    style: Style
    owner: int
    """0 or 1: two users share the server."""
    steps: list[list[Request]]

    @property
    def requests(self) -> list[Request]:
        return [request for step in self.steps for request in step]


def make_job(*, seed: int, steps: int, trainees: int) -> list[Trainee]:
    """``trainees`` adapters of different ranks, ``steps`` optimizer steps each."""
    return [_trainee(index, seed=seed, steps=steps) for index in range(trainees)]


def num_requests(job: Sequence[Trainee]) -> int:
    return sum(len(trainee.requests) for trainee in job)


def num_failures(job: Sequence[Trainee]) -> int:
    """The number of requests that must fail because of their data."""
    return sum(request.must_fail for trainee in job for request in trainee.requests)


def _trainee(index: int, *, seed: int, steps: int) -> Trainee:
    style = STYLES[index % len(STYLES)]
    name = f"{style}-{index}"
    random = Random(f"{seed} {name}")  # noqa: S311  (chooses test data)
    creation = {"rank": RANKS[index % len(RANKS)], "seed": random.randrange(2**31)}
    life = [[Request(name=f"{name}/create", kind="create", fields=creation)]]
    for number in range(steps):
        parts = _step(number, random, style, is_last=number == steps - 1)
        life.append(
            [
                Request(name=f"{name}/{number}/{place}/{kind}", kind=kind, fields=fields)
                for place, (kind, fields) in enumerate(parts)
            ]
        )
    return Trainee(name=name, style=style, owner=index // len(STYLES) % 2, steps=life)


def _step(
    number: int, random: Random, style: Style, *, is_last: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One step's requests, as kind and fields."""
    for _ in range(random.randint(1, 3)):
        yield "forward_backward", {"data": [_datum(random) for _ in range(random.randint(1, 4))]}
    if number % 7 == 3:
        yield "forward_backward", {"data": [_datum(random, bad=True)]}
    yield "optim_step", {"learning_rate": random.choice((1e-3, 3e-3)), "weight_decay": 0.01}
    if number % 3 == 1 and style != "numbered":  # the SDK samples from saved weights
        yield "sample", _sample(random)
    if number % 4 == 2:
        yield "save", {"name": f"step-{number}"}
    if number % 12 == 9:
        yield "load", {"name": f"step-{number - 3}"}
    if number % 8 == 5:
        yield "keep", {"name": f"kept-{number}"}
        yield "sample_kept", {"name": f"kept-{number}", **_sample(random)}
    if is_last:
        # An accumulated gradient without its step is part of the state too.
        yield "forward_backward", {"data": [_datum(random)]}
        yield "save", {"name": "final"}


def _datum(random: Random, *, bad: bool = False) -> Datum:
    tokens = [random.randint(*TEXT_TOKENS) for _ in range(random.randint(2, MOST_TOKENS))]
    targets = [*tokens[1:], BAD_TOKEN if bad else random.randint(*TEXT_TOKENS)]
    weights = [random.choice((0.0, 0.5, 1.0, 1.0)) for _ in tokens]
    return Datum(tokens=tokens, targets=targets, weights=weights)


def _sample(random: Random) -> dict[str, Any]:
    return {
        "prompt": [random.randint(*TEXT_TOKENS) for _ in range(random.randint(1, 12))],
        "seed": random.randrange(2**31),
        "max_tokens": random.randint(2, 16),
        "num_samples": random.randint(1, 3),
    }
