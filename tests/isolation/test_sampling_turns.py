"""The worker tells the sampler whom each sample is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import InProcessWorker
from tests.isolation.conftest import Tenant


def test_samples_of_two_users_are_of_two_groups(
    tenant: Callable[[str], Tenant],
    work: InProcessWorker,
    base_model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[str] = []
    submit = work.engine.sampler.submit
    monkeypatch.setattr(
        work.engine.sampler, "submit", lambda key, job: (groups.append(job.group), submit(key, job))
    )
    zelda, bob = tenant("zelda"), tenant("bob")
    for user in (zelda, zelda, bob):
        user.ask("POST", "/api/v1/asample", {"base_model": base_model, "prompt": "x"})
    work()

    assert sorted(groups) == sorted([str(zelda.user_id)] * 2 + [str(bob.user_id)])
