"""A model of the SDK, whose client numbers its requests, is replayed and forked like any other."""

from __future__ import annotations

from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from training.models import Checkpoint, Run
from training.replays import replay_of, replay_sentence
from training.services import run_fork, run_replay


def test_a_model_of_the_sdk_is_replayed_and_its_fork_serves_the_sdk(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    for step in range(2):
        sdk.forward_backward(model_id, 1 + 2 * step)
        sdk.optim_step(model_id, 2 + 2 * step, learning_rate=0.1)
    work()
    run = Run.objects.get(name=model_id)
    replay = run_replay(run=run, actor_id=None, key="a")
    fork = run_fork(run=run, step=1, actor_id=None, key="b")
    work()

    assert replay_sentence(replay_of(replay)).startswith("Equal to the last bit: 5 of 5 requests")
    path = str(Checkpoint.objects.get(run=fork).path)
    session_id = sdk.session()
    loaded = sdk.post(
        "load_weights",
        session_id=session_id,
        model_seq_id=0,
        path=path,
        optimizer=True,
        type="load_weights",
    )
    work()
    assert sdk.retrieve(loaded).status_code == 200, loaded.content
    assert Run.objects.get(session_id=session_id).step == 1
