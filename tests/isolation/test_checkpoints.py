"""Checkpoints pass from one tenant to another only as their owner wants, and for reading only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings

from tests.conftest import InProcessWorker
from tests.isolation.conftest import Ids, Tenant, furnished
from training.models import AuditEvent, Checkpoint, Run

Pair = tuple[Tenant, Tenant, Ids, Ids]


@pytest.fixture
def pair(tenant: Callable[[str], Tenant], work: InProcessWorker) -> Pair:
    """Zelda and Bob, with one of everything each."""
    zelda, bob = tenant("zelda"), tenant("bob")
    return zelda, bob, furnished(zelda, work), furnished(bob, work)


def path_of(ids: Ids, segment: str = "weights") -> str:
    return f"tinker://{ids['sdk_model']}/{segment}/{ids['checkpoint']}"


def address(ids: Ids, verb: str = "") -> str:
    run, name = ids["sdk_model"], ids["checkpoint"]
    return f"/api/v1/training_runs/{run}/checkpoints/weights/{name}{verb}"


def read_as(tenant: Tenant, ids: Ids, path: str, number: int, **more: Any) -> int:
    """Make a model from the checkpoint; the answer's status."""
    body = {"session_id": ids["session"], "model_seq_id": number, "path": path, **more}
    return int(tenant.ask("POST", "/api/v1/load_weights", body, sdk=True).status_code)


def test_a_public_checkpoint_is_read_by_all_and_changed_by_its_owner_only(pair: Pair) -> None:
    zelda, bob, theirs, own = pair
    assert read_as(bob, own, path_of(theirs), 8) == 404
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    assert read_as(bob, own, path_of(theirs), 8) == 200
    before = zelda.rows()
    for method, verb, body in (
        ("DELETE", "", None),
        ("DELETE", "/publish", None),
        ("POST", "/publish", None),
        ("PUT", "/ttl", {"ttl_seconds": 4000}),
    ):
        assert bob.ask(method, address(theirs, verb), body, sdk=True).status_code == 404
    assert zelda.rows() == before


def downloads(tenant: Tenant, ids: Ids) -> list[int]:
    return [
        tenant.ask("GET", address(ids, verb), sdk=True).status_code
        for verb in ("/archive", "/external_weights_urls")
    ]


def test_what_is_public_no_more_is_read_no_more(pair: Pair) -> None:
    zelda, bob, theirs, own = pair
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    zelda.ask("DELETE", address(theirs, "/publish"), sdk=True)
    assert read_as(bob, own, path_of(theirs), 8) == 404
    assert downloads(bob, theirs) == [404, 404]


def test_what_is_public_is_downloaded_by_all_and_its_owner_hears_of_it(pair: Pair) -> None:
    zelda, bob, theirs, _ = pair
    assert downloads(bob, theirs) == [404, 404]
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    assert downloads(bob, theirs) == [200, 200]
    urls = bob.ask("GET", address(theirs, "/external_weights_urls"), sdk=True).json()["urls"]
    assert urls == {name: urls[name] for name in sorted(urls)}
    assert "meta.json" in urls
    heard = AuditEvent.objects.filter(event="checkpoint_read", owner_id=zelda.user_id)
    assert {(e.actor_id, e.details["purpose"]) for e in heard} == {(bob.user_id, "download")}


def test_a_link_to_what_is_public_no_more_is_dead(pair: Pair) -> None:
    zelda, bob, theirs, _ = pair

    def fetched(link: str) -> int:
        return int(bob.ask("HEAD", urlsplit(link).path).status_code)

    own = zelda.ask("GET", address(theirs, "/external_weights_urls"), sdk=True).json()["urls"]
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    urls = bob.ask("GET", address(theirs, "/external_weights_urls"), sdk=True).json()["urls"]
    archive = bob.ask("GET", address(theirs, "/archive"), sdk=True).json()["url"]
    assert [fetched(link) for link in (urls["meta.json"], archive)] == [200, 200]
    zelda.ask("DELETE", address(theirs, "/publish"), sdk=True)
    assert [fetched(link) for link in (urls["meta.json"], archive)] == [404, 404]
    assert fetched(own["meta.json"]) == 200


def test_publishing_one_checkpoint_opens_no_other_of_the_run(pair: Pair) -> None:
    zelda, bob, theirs, own = pair
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    body = {"session_id": own["session"], "sampling_session_seq_id": 5}
    answers = [
        bob.ask(
            "POST",
            "/api/v1/create_sampling_session",
            {**body, "model_path": path_of(theirs, segment)},
            sdk=True,
        ).status_code
        for segment in ("sampler_weights", "weights")
    ]
    assert answers == [404, 200]


def test_a_lent_key_reads_the_lenders_things_and_nobody_elses(
    pair: Pair, tenant: Callable[[str], Tenant]
) -> None:
    zelda, bob, theirs, own = pair
    third = tenant("carol")
    lent = {"weights_access_token": zelda.key}
    assert read_as(bob, own, path_of(theirs), 8, **lent) == 200
    wrong = {"weights_access_token": third.key}
    assert read_as(bob, own, path_of(theirs), 9, **wrong) == 404
    # And it is for reading: objects made with it belong to the borrower.
    made = Run.objects.get(id=f"{own['session']}:train:8")
    assert made.owner_id == bob.user_id
    assert AuditEvent.objects.filter(
        event="checkpoint_read", owner_id=zelda.user_id, actor_id=bob.user_id
    ).exists()


def test_a_copy_is_the_borrowers_and_outlives_the_original(
    pair: Pair, work: InProcessWorker
) -> None:
    zelda, bob, theirs, _ = pair
    zelda.ask("POST", address(theirs, "/publish"), sdk=True)
    copied = bob.ask("POST", "/api/v1/copy_weights", {"source_path": path_of(theirs)}, sdk=True)
    copy_path = copied.json()["tinker_path"]
    copy = Checkpoint.objects.get(run__owner_id=bob.user_id, run__user_metadata__has_key="copy_of")
    original = Checkpoint.objects.get(
        run_id=theirs["sdk_model"], kind="training", name=theirs["checkpoint"]
    )
    assert not copy.public
    zelda_asks = zelda.ask("POST", "/api/v1/weights_info", {"tinker_path": copy_path}, sdk=True)
    assert zelda_asks.status_code == 404
    content = {file.name: file.read_bytes() for file in folder(copy).iterdir()}

    assert zelda.ask("DELETE", address(theirs), sdk=True).status_code == 204

    assert not folder(original).exists()
    assert {file.name: file.read_bytes() for file in folder(copy).iterdir()} == content


def folder(checkpoint: Checkpoint) -> Path:
    return Path(settings.DATA_DIR) / checkpoint.directory


def test_a_model_named_like_anothers_run_hides_and_opens_nothing(
    pair: Pair, work: InProcessWorker
) -> None:
    zelda, bob, theirs, _ = pair
    # Names are per owner, so Bob may give his model the very name of Zelda's.
    stolen = theirs["sdk_model"]
    for path, body in (
        ("/add_lora", {"model_id": stolen, "rank": 2}),
        ("/save_weights", {"model_id": stolen, "name": theirs["checkpoint"]}),
    ):
        assert bob.ask("POST", path, body).status_code == 200
    work()
    info = {"tinker_path": path_of(theirs)}
    ranks = [
        one.ask("POST", "/api/v1/weights_info", info, sdk=True).json()["lora_rank"]
        for one in (zelda, bob)
    ]
    assert ranks == [4, 2]
    # And publishing his does not put it into her path.
    bob.ask("POST", address(theirs, "/publish"), sdk=True)
    assert zelda.ask("POST", "/api/v1/weights_info", info, sdk=True).json()["lora_rank"] == 4
    assert not Checkpoint.objects.get(run_id=stolen, kind="training").public
