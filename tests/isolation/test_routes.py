"""Every address, asked for another's things: it answers as for things that do not exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import transaction
from django.urls import URLResolver, get_resolver

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.isolation.conftest import Ids, Tenant, furnished, of_nobody, waiting
from tests.isolation.routes import ROUTES, Listing, Open, Probe
from training.storage.data_folder import DataFolder

Made = tuple[Tenant, Tenant, Ids, Ids]


def addresses(resolver: Any, prefix: str = "") -> Iterator[str]:
    """Every route of the URL conf, the admin's apart (``test_admin``)."""
    for pattern in resolver.url_patterns:
        route = prefix + str(pattern.pattern)
        if route == "admin/":
            continue
        if isinstance(pattern, URLResolver):
            yield from addresses(pattern, route)
        else:
            yield route


def test_every_address_says_what_ids_it_takes() -> None:
    assert set(addresses(get_resolver())) == set(ROUTES)


def probes() -> list[Probe]:
    tables = [entry for entry in ROUTES.values() if not isinstance(entry, Open)]
    return [item for table in tables for item in table if isinstance(item, Probe)]


def listings() -> list[Listing]:
    tables = [entry for entry in ROUTES.values() if not isinstance(entry, Open)]
    return [item for table in tables for item in table if isinstance(item, Listing)]


def filled(template: Any, ids: Ids) -> Any:
    """The template with every ``{name}`` in it replaced."""
    if isinstance(template, str):
        return re.sub(r"\{(\w+)\}", lambda found: ids[found[1]], template)
    if isinstance(template, dict):
        return {name: filled(value, ids) for name, value in template.items()}
    return [filled(item, ids) for item in template] if isinstance(template, list) else template


@pytest.fixture
def made(
    tenant: Callable[[str], Tenant], work: InProcessWorker, base_model: str, nobody_waits: None
) -> Made:
    """Zelda and Bob, with the ids of Zelda's objects and ids that do not exist."""
    zelda, bob = tenant("zelda"), tenant("bob")
    theirs, own = furnished(zelda, work), furnished(bob, work)
    theirs["pending"], own["pending"] = waiting(zelda), waiting(bob)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    always = {f"own_{name}": value for name, value in own.items()} | {
        "base_model": base_model,
        "hour": hour.strftime("%Y-%m-%dT%H:00:00Z"),
        "next_hour": (hour + timedelta(hours=1)).strftime("%Y-%m-%dT%H:00:00Z"),
    }
    return zelda, bob, {**theirs, **always}, {**of_nobody(theirs), **always}


def outcome(
    tenant: Tenant, probe: Probe, ids: Ids, *, untouched: Tenant | None = None
) -> tuple[int, str]:
    """Status and text of an answer, with ids replaced by names; its effects are rolled back.

    A submission's answer is followed to what its future says already.

    Args:
        untouched: Whose rows must be after it what they were before.
    """
    with transaction.atomic():
        before = untouched and untouched.rows()
        answer = tenant.ask(
            probe.method,
            filled(probe.path, ids),
            None if probe.body is None else filled(probe.body, ids),
            sdk=probe.sdk,
        )
        text = answer.content.decode()
        for request_id in re.findall(r'"request_id":"(future_\w{32})"', text):
            future = Future.objects.filter(pk=request_id, state="failed").first()
            if future is not None:
                text += f" {future.state}: {future.error}"
        assert before == (untouched and untouched.rows()), probe
        transaction.set_rollback(True)
    for name in sorted(ids, key=lambda name: -len(ids[name])):
        text = text.replace(ids[name], f"<{name}>")
    # Values that differ in every answer: ids, times, signatures.
    text = re.sub(r"future_[0-9a-f]{32}|log id \w+|\d{4}-\d\d-\d\dT[\d:.+Z-]+", "<new>", text)
    return answer.status_code, text


def of_owner(ids: Ids) -> Ids:
    """Ids for the owner's question: ``{own_...}`` is theirs as well."""
    return ids | {f"own_{name}": value for name, value in ids.items() if f"own_{name}" in ids}


def test_anothers_things_answer_as_things_that_do_not_exist(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    zelda, bob, theirs, nobodys = made
    monkeypatch.setattr(DataFolder, "delete", lambda *args: None)
    wrong: list[object] = []
    for probe in probes():
        asked = outcome(bob, probe, theirs, untouched=zelda)
        missing = outcome(bob, probe, nobodys)
        if asked != missing:
            wrong.append((probe, "another's", asked, "nobody's", missing))
        # A probe that is refused for another reason would prove nothing.
        if asked == outcome(zelda, probe, of_owner(theirs)) and not probe.makes_own:
            wrong.append((probe, "no different for the owner", asked))
    assert not wrong, "\n".join(map(str, wrong))


def test_lists_hold_ones_own_only(made: Made) -> None:
    zelda, bob, theirs, _ = made
    for listing in listings():
        texts = []
        for tenant in (zelda, bob):
            body = None if listing.body is None else filled(listing.body, theirs)
            answer = tenant.ask(listing.method, filled(listing.path, theirs), body, sdk=listing.sdk)
            assert answer.status_code == 200, (listing, answer.content)
            texts.append(answer.content.decode())
        own = {name: value for name, value in theirs.items() if not name.startswith("own_")}
        marks = {own["session"], "zelda"}
        assert any(mark in texts[0] for mark in marks), (listing, texts[0])
        assert not any(mark in texts[1] for mark in marks), (listing, texts[1])
