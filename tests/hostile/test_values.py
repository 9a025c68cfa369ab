"""Every address and every field, with the same hostile values: no 5xx, and nothing is left broken.

A slice of the cases, another one of each field, is run with the suite; ``HOSTILE=all python -m
pytest tests/hostile`` runs them all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from urllib.parse import quote

from django.urls import get_resolver

from tests.hostile.conftest import NUMBERED, WHOLE, Attacker
from tests.hostile.examples import Example, declared_fields, examples
from tests.hostile.mutations import Mutation, mutations
from tests.hostile.values import TEXTS
from tests.isolation.test_routes import addresses

SLICE = 400
"""The number of cases in the suite."""

QUERIES = ("offset", "limit", "project_id", "access_scope", "day", "event_type", "starting_on",
    "ending_before", "version", "format", "lang", "name")  # fmt: skip
HEADERS = ("X-API-Key", "Authorization", "Idempotency-Key", "X-Idempotency-Key", "Accept", "Range",
    "X-Tinker-Weights-Access-Token", "X-Stainless-Package-Version", "Content-Encoding", "If-Range",
    "Origin", "Host")  # fmt: skip


def cases(found: list[Example]) -> Iterator[tuple[Example, Mutation]]:
    for example in found:
        if example.body is not None:
            for mutation in mutations(example.body, declared_fields(example)):
                yield example, mutation


def test_every_field_of_every_body(attacker: Attacker) -> None:
    found = examples(attacker.ids, attacker.base_model)
    assert len({example.path for example in found}) > 50
    everything = list(cases(found))
    chosen = everything if WHOLE else random.Random(9).sample(everything, SLICE)  # noqa: S311
    for count, (example, mutation) in enumerate(chosen, 1):
        fresh = attacker.next_body(example.body)
        [again] = [
            one
            for one in mutations(fresh, [mutation.where])
            if (one.where, one.what) == (mutation.where, mutation.what)
        ][:1]
        if NUMBERED.match(example.path) and example.sdk and "model_id" in example.body:
            attacker.numbered(example, again.body)
        else:
            attacker.seq_id -= 1
            attacker.send(example.method, example.path, again.body, sdk=example.sdk)
        if count % 200 == 0:
            attacker.settle(f"{example.path} {mutation.where}: {mutation.what}")
    attacker.check()
    print(f"{attacker.requests} requests: {sorted(attacker.statuses.items())}")  # noqa: T201


def test_every_part_of_every_address(attacker: Attacker) -> None:
    routes = sorted(set(addresses(get_resolver())))
    pairs = [(route, text) for route in routes for text in TEXTS if "<" in route]
    pairs += [(f"{route}?{name}=", text) for route in routes for name in QUERIES for text in TEXTS]
    for route, text in pairs if WHOLE else random.Random(9).sample(pairs, SLICE // 2):  # noqa: S311
        part = quote(text, safe="", errors="surrogatepass")
        path = "/" + (route + part if route.endswith("=") else filled_in(route, part))
        for method in ("GET", "DELETE", "POST", "PUT"):
            attacker.send(method, path, "{}" if method in ("POST", "PUT") else b"", sdk=True)
    attacker.check()
    print(f"{attacker.requests} requests: {sorted(attacker.statuses.items())}")  # noqa: T201


def filled_in(route: str, part: str) -> str:
    """The route with each of its parameters replaced by the part."""
    while "<" in route:
        begin, _, rest = route.partition("<")
        route = begin + part + rest.partition(">")[2]
    return route


def test_every_header(attacker: Attacker) -> None:
    requests = (
        Example("POST", "/optim_step", '{"model_id": "x"}'),
        Example(
            "POST", "/api/v1/copy_weights", '{"source_path": "tinker://a/weights/b"}', sdk=True
        ),
        Example("POST", "/api/v1/unload_model", '{"model_id": "x"}', sdk=True),
        Example("GET", "/v1/models", ""),
    )
    triples = [(name, text, one) for name in HEADERS for text in TEXTS for one in requests]
    for name, text, one in triples if WHOLE else random.Random(9).sample(triples, SLICE // 2):  # noqa: S311
        value = text.encode("utf-8", "surrogatepass").decode("latin-1")
        attacker.send(one.method, one.path, one.body, sdk=one.sdk, headers={name: value})
    attacker.check()
