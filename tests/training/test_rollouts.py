"""What is sampled from a run is kept as text, and gets its advantage from the training request."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.utils import timezone

from futures.payload import decode
from tests.conftest import InProcessWorker
from training.models import Checkpoint, RenderedData, Rollout, Run, SampledStep
from training.services import (
    forward_backward_submit,
    optim_step_submit,
    sample_submit,
    save_weights_submit,
)
from training.services.rollouts import rollouts_forget
from training.types import AdamParams, Conversation, Datum, Message, SamplingParams
from training.worker import rollouts
from training.worker.rollouts import sequence_advantages


@pytest.fixture
def owner(django_user_model: type[User]) -> User:
    return django_user_model.objects.create(username="ann")


def train(owner: User, data: list[Datum], **more: Any) -> str:
    future = forward_backward_submit(
        owner_id=owner.pk,
        model_id="policy",
        data=data,
        loss_fn="importance_sampling",
        loss_fn_config={},
        train_on="auto",
        forward_only=False,
    ).future
    return str(future.pk)


def sample(owner: User, prompts: Sequence[Any], **more: Any) -> None:
    fields: dict[str, Any] = {
        "owner_id": owner.pk,
        "model_id": "policy",
        "base_model": None,
        "model_path": None,
        "prompts": prompts,
        "num_samples": 2,
        "sampling_params": SamplingParams(max_tokens=4, seed=1),
        "prompt_logprobs": False,
    }
    sample_submit(**{**fields, **more})


def datum(*parts: tuple[Sequence[int], float | None]) -> Datum:
    """Tokens in turns, as client libraries send them: (tokens, advantage; None for a prompt)."""
    tokens = [token for part, _ in parts for token in part]
    advantages = [advantage or 0.0 for part, advantage in parts for _ in part]
    logprobs = [0.0 if advantage is None else -1.0 for part, advantage in parts for _ in part]
    return Datum(
        model_input=np.array(tokens[:-1], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "advantages": np.array(advantages[1:], np.float32),
            "logprobs": np.array(logprobs[1:], np.float32),
        },
    )


@pytest.fixture
def run(owner: User, work: InProcessWorker) -> Run:
    """A run of one step."""
    train(owner, [datum(([1, 2], None), ([3], 1.0))])
    optim_step_submit(owner_id=owner.pk, model_id="policy", adam_params=AdamParams())
    work()
    return Run.objects.get(name="policy")


def tokens_of(text: str) -> list[int]:
    """The fake engine's tokenizer has one token for each byte."""
    return list(text.encode())


def test_each_sequence_of_a_run_is_kept_with_its_texts_and_its_step(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    sample(owner, ["Zürich", np.array(tokens_of("abc"), np.int32)])
    work()
    rows = list(Rollout.objects.order_by("number"))
    assert [row.prompt for row in rows] == ["Zürich", "Zürich", "abc", "abc"]
    assert {row.step for row in rows} == {1}
    assert len({bytes(row.prompt_digest) for row in rows}) == 2
    assert all(row.completion and row.tokens and row.logprob_mean is not None for row in rows)
    sums = SampledStep.objects.get(run=run, step=1)
    assert sums.sequences == 4
    assert sums.tokens == sum(row.tokens for row in rows)
    assert sums.stopped_by_length == sum(row.stop_reason == "length" for row in rows)
    expected = sum(row.tokens * (row.logprob_mean or 0) for row in rows)
    assert sums.logprob_sum == pytest.approx(expected)


def test_samples_of_a_checkpoint_belong_to_its_run_and_step(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    save = {"owner_id": owner.pk, "model_id": "policy", "name": "first", "overwrite": False}
    save_weights_submit(**save, kind="sampler", ttl_seconds=None, user_metadata={})
    optim_step_submit(owner_id=owner.pk, model_id="policy", adam_params=AdamParams())
    work()
    sample(owner, ["a"], model_id=None, model_path="tinker://policy/sampler_weights/first")
    work()
    assert set(Rollout.objects.values_list("run_id", "step")) == {(run.pk, 1)}


def test_another_users_samples_of_a_public_checkpoint_are_not_kept(
    owner: User, run: Run, work: InProcessWorker, django_user_model: type[User]
) -> None:
    save = {"owner_id": owner.pk, "model_id": "policy", "name": "first", "overwrite": False}
    save_weights_submit(**save, kind="sampler", ttl_seconds=None, user_metadata={})
    work()
    Checkpoint.objects.update(public=True)
    guest = django_user_model.objects.create(username="bob")
    path = str(Checkpoint.objects.get().global_path)
    sample(guest, ["my secret"], model_id=None, model_path=path)
    work()
    assert not Rollout.objects.exists()
    assert not SampledStep.objects.exists()


def test_requests_that_only_score_a_prompt_are_not_kept(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    params = SamplingParams(max_tokens=1, seed=1)
    sample(owner, ["a"], prompt_logprobs=True, sampling_params=params, num_samples=1)
    work()
    assert not Rollout.objects.exists()


def test_a_training_request_gives_each_completion_its_advantage(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    prompt = tokens_of("2+2=")
    sample(owner, [np.array(prompt, np.int32)], num_samples=3)
    work()
    rows = list(Rollout.objects.order_by("number"))
    completions = [tokens_of(row.completion) for row in rows]
    data = [
        datum((prompt, None), (completions[0], 1.5)),
        datum((prompt, None), (completions[1], 0)),
    ]
    request_id = train(owner, data)
    work()
    after = list(Rollout.objects.order_by("number"))
    assert [row.advantage for row in after] == [1.5, 0.0, None]
    assert [row.trained_by for row in after] == [request_id, request_id, ""]


def test_the_same_tokens_sampled_again_keep_their_first_advantage(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    prompt = tokens_of("2+2=")
    for advantage in (1.5, -0.5):
        sample(owner, [np.array(prompt, np.int32)], num_samples=1)  # with one seed
        work()
        completion = tokens_of(Rollout.objects.latest("pk").completion)
        train(owner, [datum((prompt, None), (completion, advantage))])
        work()
    rows = Rollout.objects.order_by("pk")
    assert len({bytes(row.sequence_digest) for row in rows}) == 1
    assert [row.advantage for row in rows] == [1.5, -0.5]


def test_each_turn_of_a_longer_datum_gets_its_own_advantage(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    first = tokens_of("ask")
    sample(owner, [np.array(first, np.int32)], num_samples=1)
    work()
    answer = tokens_of(Rollout.objects.get().completion)
    second = [*first, *answer, *tokens_of("more")]
    sample(owner, [np.array(second, np.int32)], num_samples=1)
    work()
    last = tokens_of(Rollout.objects.latest("pk").completion)
    train(
        owner,
        [datum((first, None), (answer, 0.5), (tokens_of("more"), None), (last, -2.0))],
    )
    work()
    assert list(Rollout.objects.order_by("pk").values_list("advantage", flat=True)) == [0.5, -2.0]


def test_a_request_of_very_many_turns_is_looked_at_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollouts, "MAX_TURNS", 3)
    turns = [part for n in range(20) for part in (([n], None), ([n], 1.0))]
    assert len(sequence_advantages([datum(([0], None), *turns)])) == 3
    odd = datum(([1], None), ([2, 3], 1.0))
    shapes = {**odd.loss_fn_inputs, "target_tokens": np.ones((2, 2), np.int64)}
    assert sequence_advantages([Datum(model_input=odd.model_input, loss_fn_inputs=shapes)]) == []


def test_texts_that_the_database_cannot_hold_are_written_out(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    sample(owner, [np.array([0, 65, 255], np.int32)])
    work()
    assert Rollout.objects.first().prompt == "\\u0000A\N{REPLACEMENT CHARACTER}"  # type: ignore[union-attr]


def test_old_rollouts_and_too_many_of_a_run_are_deleted(
    owner: User, run: Run, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        sample(owner, ["a"])
    work()
    assert Rollout.objects.count() == 6
    newest = set(Rollout.objects.order_by("-pk").values_list("pk", flat=True)[:4])
    monkeypatch.setattr(settings, "ROLLOUTS_PER_RUN", 4)
    rollouts_forget()
    assert set(Rollout.objects.values_list("pk", flat=True)) == newest
    oldest = min(newest)
    age = timezone.now() - timedelta(days=settings.KEEP_RESULTS_DAYS, hours=1)
    Rollout.objects.filter(pk=oldest).update(created_at=age)
    rollouts_forget()
    assert set(Rollout.objects.values_list("pk", flat=True)) == newest - {oldest}


def test_none_is_kept_if_the_operator_says_so(
    owner: User, run: Run, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "ROLLOUTS_PER_RUN", 0)
    sample(owner, ["a"])
    work()
    assert not Rollout.objects.exists()
    assert SampledStep.objects.get().sequences == 2


def test_tokens_are_kept_of_text_only_and_until_they_are_old(
    owner: User, run: Run, work: InProcessWorker
) -> None:
    assert not RenderedData.objects.exists()  # the run was trained on tokens
    text = Conversation((Message("user", "hi"), Message("assistant", "yes")))
    future = forward_backward_submit(
        owner_id=owner.pk,
        model_id="policy",
        data=[text],
        loss_fn="cross_entropy",
        loss_fn_config={},
        train_on="auto",
        forward_only=False,
    ).future
    work()
    row = RenderedData.objects.get()
    assert (row.request_id, row.run_id) == (future.pk, run.pk)
    [example] = decode(bytes(row.data))
    assert b"yes" in bytes(example["loss_fn_inputs"]["target_tokens"].astype(np.uint8))
    age = timezone.now() - timedelta(days=settings.KEEP_RESULTS_DAYS, hours=1)
    RenderedData.objects.update(created_at=age)
    rollouts_forget()
    assert not RenderedData.objects.exists()
