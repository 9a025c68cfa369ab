"""A quick-reference model's checkpoint can be reached by others at a path that its owner gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import InProcessWorker
from tests.isolation.conftest import HI, Tenant

LIST = "/api/v1/checkpoints"
RUN = "/api/v1/training_runs/shared/checkpoints"
PUBLISH = f"{RUN}/sampler_weights/pub/publish"


@pytest.fixture
def pair(tenant: Callable[[str], Tenant], work: InProcessWorker) -> tuple[Tenant, Tenant]:
    """Zelda and Bob, who both have a model ``shared`` with ``sampler_weights/pub``."""
    zelda, bob = tenant("zelda"), tenant("bob")
    for one in (zelda, bob):
        one.ask("POST", "/fwdbwd", {"model_id": "shared", "data": HI})
        body = {"model_id": "shared", "name": "pub"}
        one.ask("POST", "/save_weights_for_sampler", body)
    work()
    return zelda, bob


def sample(one: Tenant, path: str) -> int:
    body = {"model_path": path, "prompt": "hi", "sampling_params": {"max_tokens": 1}}
    return int(one.ask("POST", "/api/v1/asample", body).status_code)


def listed(one: Tenant, url: str = LIST) -> dict[str, Any]:
    [only] = one.ask("GET", url).json()["checkpoints"]
    return dict(only)


def test_publishing_tells_the_path_that_everybody_may_use(pair: tuple[Tenant, Tenant]) -> None:
    zelda, bob = pair
    unpublished = listed(bob)
    assert sample(zelda, unpublished["global_path"]) == 404
    published = bob.ask("POST", PUBLISH)

    path = published.json()["global_path"]
    assert published.json() == {
        "public": True,
        "tinker_path": "tinker://shared/sampler_weights/pub",
        "global_path": unpublished["global_path"],
    }
    assert [sample(one, path) for one in pair] == [200, 200]
    assert zelda.ask("GET", f"/v1/models/{path}").json()["id"] == path
    assert listed(zelda)["global_path"] != path

    withdrawn = bob.ask("DELETE", PUBLISH).json()
    assert (withdrawn["public"], withdrawn["global_path"]) == (False, path)
    assert [sample(one, path) for one in pair] == [404, 200]


def test_the_global_path_is_built_from_the_run_id_that_get_info_says(
    pair: tuple[Tenant, Tenant],
) -> None:
    _, bob = pair
    run_id = bob.ask("POST", "/get_info", {"model_id": "shared"}).json()["run_id"]
    [adapter] = bob.ask("GET", "/api/v1/adapters").json()["adapters"]
    assert adapter["run_id"] == run_id
    found = listed(bob, RUN)
    assert found["global_path"] == f"tinker://{run_id}/sampler_weights/pub"
    assert listed(bob, RUN.replace("shared", run_id)) == found


def test_the_owner_may_use_the_global_path_for_everything(pair: tuple[Tenant, Tenant]) -> None:
    zelda, bob = pair
    run_id = bob.ask("POST", "/get_info", {"model_id": "shared"}).json()["run_id"]
    url = RUN.replace("shared", run_id) + "/sampler_weights/pub"
    assert zelda.ask("POST", f"{url}/publish").status_code == 404
    assert bob.ask("POST", f"{url}/publish").status_code == 200
    assert zelda.ask("DELETE", url).status_code == 404
    assert bob.ask("DELETE", url).status_code == 204
    assert bob.ask("GET", LIST).json()["checkpoints"] == []


def test_the_sdk_is_answered_as_it_expects(pair: tuple[Tenant, Tenant]) -> None:
    _, bob = pair
    for method in ("POST", "DELETE"):
        answer = bob.ask(method, PUBLISH, sdk=True)
        assert (answer.status_code, answer.content) == (204, b"")
    for url in (LIST, RUN):
        [only] = bob.ask("GET", url, sdk=True).json()["checkpoints"]
        assert "global_path" not in only
