"""A run's requests, end to end through the real loop on the fake engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from training import services
from training.base_models import base_model_get
from training.engine.fake.engine import fake_engine
from training.errors import RunExists, RunNotFound
from training.models import Checkpoint, Run
from training.types import Datum, LoraConfig, SamplingParams
from training.worker import loop

Submit = Callable[..., Future]
Result = Callable[..., dict[str, object]]


def sample(owner: User, **fields: object) -> services.Submission:
    return services.sample_submit(
        **{
            "owner_id": owner.pk,
            "model_id": None,
            "base_model": None,
            "model_path": None,
            "prompts": ["hello"],
            "num_samples": 1,
            "sampling_params": SamplingParams(max_tokens=8, seed=1),
            **fields,
        }
    )


def save(owner: User, model_id: str, name: str, **fields: object) -> services.Submission:
    return services.save_weights_submit(
        **{"owner_id": owner.pk, "model_id": model_id, "name": name, "kind": "training", **fields}
    )


def load(owner: User, model_id: str, path: str, **fields: object) -> services.Submission:
    return services.load_weights_submit(owner_id=owner.pk, model_id=model_id, path=path, **fields)


def test_an_unknown_model_is_made_by_its_first_forward_backward(
    work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    future = forward_backward("user_123", "test")
    work()
    answer = result(future)
    assert answer["model_id"] == "user_123"
    assert np.isfinite(answer["loss"])
    assert Run.objects.get(name="user_123").state == "ready"


def test_loss_is_the_weighted_mean_and_the_sum_is_in_the_metrics(
    work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    weights = np.array([0.0, 2.0, 1.0], np.float32)
    datum = Datum(
        model_input=np.array([1, 2, 3], np.int32),
        loss_fn_inputs={"target_tokens": np.array([2, 3, 4], np.int64), "weights": weights},
    )
    future = forward_backward("m", data=[datum])
    work()
    answer = result(future)
    logprobs = answer["loss_fn_outputs"][0]["logprobs"]
    total = -float((weights * logprobs).sum())
    assert answer["metrics"]["loss:sum"] == pytest.approx(total, rel=1e-6)
    assert answer["loss"] == pytest.approx(total / 3.0, rel=1e-6)
    assert answer["metrics"]["perplexity"] == pytest.approx(np.exp(total / 3.0), rel=1e-6)
    assert answer["metrics"]["num_tokens"] == 3
    assert answer["metrics"]["num_weighted_tokens"] == 2


def test_operations_of_a_model_run_in_order_although_claimed_together(
    work: InProcessWorker, forward_backward: Submit, optim_step: Submit, result: Result
) -> None:
    before = forward_backward("m", "hi", "hello")
    step = optim_step("m", learning_rate=0.5)
    after = forward_backward("m", "hi", "hello")
    work()
    assert result(step)["metrics"]["step"] == 1
    assert result(after)["loss"] < result(before)["loss"]


def test_consecutive_passes_of_several_runs_share_one_engine_call(
    work: InProcessWorker, forward_backward: Submit
) -> None:
    for name in ("a", "b"):
        forward_backward(name, "hi")
    work()
    calls: list[tuple[str, ...]] = []
    work.engine.trainer._before_verb = lambda verb, names: (
        calls.append(names) if verb == "forward_backward" else None
    )
    for _ in range(2):
        for name in ("a", "b"):
            forward_backward(name, "hi")
    work()
    assert [len(names) for names in calls] == [4]


def test_delayable_requests_wait_for_those_that_keep_arriving(
    work: InProcessWorker, forward_backward: Submit
) -> None:
    forward_backward("m", "hi")
    work()
    calls: list[int] = []
    work.engine.trainer._before_verb = lambda verb, names: calls.append(len(names))
    arriving = iter(["second", "third"])

    def bell_rang(seconds: float) -> bool:
        if seconds == 0 or (text := next(arriving, None)) is None:
            return False
        forward_backward("m", text, delayable=True)
        return True

    work.loop._bell_rang = bell_rang
    forward_backward("m", "first", delayable=True)
    work()
    assert calls == [3]


def test_a_request_that_somebody_waits_for_is_not_held_back(
    work: InProcessWorker, forward_backward: Submit
) -> None:
    asked: list[float] = []
    work.loop._bell_rang = lambda seconds: asked.append(seconds) or False
    forward_backward("m", "hi")
    work()
    assert set(asked) <= {0}


def test_a_bad_datum_fails_its_own_future_and_nothing_else(
    work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    bad = Datum(
        model_input=np.array([99999], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array([1], np.int64),
            "weights": np.ones(1, np.float32),
        },
    )
    good = forward_backward("m", "hi")
    refused = forward_backward("m", data=[bad])
    alone = forward_backward("n", "hi")
    work()
    refused.refresh_from_db()
    assert (refused.state, refused.category) == ("failed", "user")
    assert "data[0]" in refused.error
    assert result(good)["loss"] == pytest.approx(result(alone)["loss"])


def test_forward_changes_nothing(
    work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    forward_backward("m", "hi", "hello")
    work()
    run = Run.objects.get(name="m")
    before = work.engine.trainer.adapter_state(run.id)
    forward_backward("m", "other", "text", forward_only=True)
    work()
    after = work.engine.trainer.adapter_state(run.id)
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


def test_a_sample_of_a_model_sees_the_steps_before_it_and_none_after(
    owner: User,
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    result: Result,
) -> None:
    forward_backward("m", "hi", "hello")
    work()
    first = sample(owner, model_id="m")
    work()
    again = sample(owner, model_id="m")
    optim_step("m", learning_rate=0.5)
    later = sample(owner, model_id="m")
    work()
    assert result(again)["completions"] == result(first)["completions"]
    assert result(later)["completions"] != result(first)["completions"]


def test_each_prompt_gives_its_samples_in_order(
    owner: User, work: InProcessWorker, result: Result
) -> None:
    base_model = base_model_get(None).name
    together = sample(owner, base_model=base_model, prompts=["a", "b"], num_samples=2)
    single = sample(owner, base_model=base_model, prompts=["b"], num_samples=2)
    work()
    answer = result(together)
    assert len(answer["sequences"]) == 4
    assert answer["completions"][2:] == result(single)["completions"]
    assert answer["generated_text"] == answer["completions"][0]


def test_a_checkpoint_restores_weights_optimizer_and_step(
    owner: User,
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    result: Result,
) -> None:
    forward_backward("m", "hi", "hello")
    optim_step("m", learning_rate=0.5)
    saved = save(owner, "m", "first")
    work()
    state = work.engine.trainer.adapter_state(Run.objects.get(name="m").id)
    forward_backward("m", "hi", "hello")
    optim_step("m", learning_rate=0.5)
    loaded = load(owner, "m", str(result(saved)["path"]))
    work()
    assert result(loaded)["path"] == "tinker://m/weights/first"
    restored = work.engine.trainer.adapter_state(Run.objects.get(name="m").id)
    for key in state:
        np.testing.assert_array_equal(state[key], restored[key])
    assert Run.objects.get(name="m").step == 1


def test_a_sampler_checkpoint_is_frozen(
    owner: User,
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    result: Result,
) -> None:
    forward_backward("m", "hi", "hello")
    saved = save(owner, "m", "frozen", kind="sampler")
    work()
    path = str(result(saved)["path"])
    first = sample(owner, model_path=path)
    optim_step("m", learning_rate=0.5)
    work()
    second = sample(owner, model_path=path)
    work()
    assert result(first)["completions"] == result(second)["completions"]


def test_a_name_is_saved_once_unless_overwrite_is_asked_for(
    owner: User, work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    forward_backward("m", "hi")
    first, second = save(owner, "m", "x"), save(owner, "m", "x")
    third = save(owner, "m", "x", overwrite=True)
    work()
    result(first)
    second.future.refresh_from_db()
    assert (second.future.state, second.future.error_code) == ("failed", "CheckpointExists")
    result(third)
    assert Checkpoint.objects.get().seq_id == third.future.seq_id


def test_a_removed_name_is_free_at_once_and_its_requests_still_run(
    owner: User, work: InProcessWorker, forward_backward: Submit, result: Result
) -> None:
    before = forward_backward("m", "hi")
    removed = services.run_remove_submit(owner_id=owner.pk, model_id="m")
    again = forward_backward("m", "hi")
    work()
    assert result(before)["loss"] == result(again)["loss"]
    assert result(removed) == {"status": "deleted", "model_id": "m"}
    assert work.engine.trainer.adapter_names() == [Run.objects.get(deleted_at=None).id]


def test_removing_twice_is_not_found(owner: User, forward_backward: Submit) -> None:
    forward_backward("m", "hi")
    services.run_remove_submit(owner_id=owner.pk, model_id="m")
    with pytest.raises(RunNotFound):
        services.run_remove_submit(owner_id=owner.pk, model_id="m")


def test_a_name_that_is_taken_is_refused(owner: User) -> None:
    fields = {"owner_id": owner.pk, "base_model": None, "lora_config": LoraConfig()}
    services.run_create_submit(model_id="m", **fields)
    with pytest.raises(RunExists, match="'m'"):
        services.run_create_submit(model_id="m", **fields)


def test_two_owners_may_use_one_name(
    work: InProcessWorker, forward_backward: Submit, optim_step: Submit, result: Result
) -> None:
    other = User.objects.create_user("grace")
    mine = forward_backward("m", "hi", "hello")
    theirs = forward_backward("m", "hi", "hello", owner_id=other.pk)
    optim_step("m", learning_rate=0.5)
    mine_after = forward_backward("m", "hi", "hello")
    theirs_after = forward_backward("m", "hi", "hello", owner_id=other.pk)
    work()
    assert result(mine)["loss"] == result(theirs)["loss"] == result(theirs_after)["loss"]
    assert result(mine_after)["loss"] < result(mine)["loss"]
    with pytest.raises(RunNotFound):
        optim_step("m2", owner_id=other.pk)


def test_repeating_a_request_with_its_key_is_the_same_request(
    owner: User, forward_backward: Submit
) -> None:
    first = forward_backward("m", "hi", idempotency_key="k")
    assert forward_backward("m", "hi", idempotency_key="k").id == first.id
    drawn = sample(owner, model_id="m", sampling_params=SamplingParams(), idempotency_key="s")
    again = sample(owner, model_id="m", sampling_params=SamplingParams(), idempotency_key="s")
    assert drawn.future.id == again.future.id
    named = services.run_create_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model=None,
        lora_config=LoraConfig(),
        idempotency_key="c",
    )
    same = services.run_create_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model=None,
        lora_config=LoraConfig(),
        idempotency_key="c",
    )
    assert (named.model_id, named.future.id) == (same.model_id, same.future.id)


def test_a_run_remembers_its_last_request(
    work: InProcessWorker, forward_backward: Submit, optim_step: Submit
) -> None:
    forward_backward("m", "hi")
    work()
    before = Run.objects.get(name="m").last_request_at
    forward_backward("m", "hi", forward_only=True)
    work()
    assert Run.objects.get(name="m").last_request_at > before


def test_others_go_on_while_what_computes_a_clients_own_loss_starts(
    start_worker: Callable[..., InProcessWorker],
    forward_backward: Submit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = fake_engine()
    asked: list[str] = []

    def prepare() -> bool:
        asked.append(Future.objects.get(pk=plain.pk).state)
        return len(asked) > 20

    monkeypatch.setattr(engine.trainer, "prepare_custom_losses", prepare)
    work = start_worker(engine)
    own, plain = forward_backward("own", "hi"), forward_backward("plain", "hi")
    monkeypatch.setattr(loop, "has_custom_loss", lambda future: future.pk == own.pk)
    work()
    for future in (own, plain):
        future.refresh_from_db()
        assert future.state == "ready"
    assert asked[-1] == "ready"
    assert own.finished_at is not None
    assert plain.finished_at is not None
    assert plain.finished_at < own.finished_at
