"""Training over two ranks gives what one process gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tests.engine.group.conftest import ADAPTERS, Pair, close, in_both_dtypes
from training.custom_loss_graph import check_graph
from training.engine.interface import ForwardBackwardJob
from training.errors import (
    CheckpointNotFound,
    InvalidDatum,
    InvalidRequest,
    NonFiniteResult,
    TrainingError,
)
from training.loss_fns import LOSS_FNS
from training.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig

MakeDatum = Callable[..., Datum]
RAGGED = (9, 40, 3, 64, 17, 1, 28)
SETTINGS = {"gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, "dro": {"beta": 0.5}}
STEP = AdamParams(learning_rate=0.01, eps=1.0)
"""With a small epsilon the first step is the sign of each gradient, so that rounding would decide
it where a gradient is nearly zero."""


def same_results(
    pair: Pair, jobs: Sequence[ForwardBackwardJob]
) -> list[ForwardBackwardOutput | TrainingError]:
    """Run the jobs in both, and compare; the group's results."""
    alone, group = (engine.trainer.forward_backward(jobs) for engine in pair.both())
    for ours, theirs in zip(group, alone, strict=True):
        if isinstance(theirs, TrainingError):
            assert (type(ours), str(ours)) == (type(theirs), str(theirs))
            continue
        assert isinstance(ours, ForwardBackwardOutput)
        for own, expected in zip(ours.logprobs, theirs.logprobs, strict=True):
            close(own, expected, "log-probabilities")
        for name, value in theirs.metrics.items():
            if name != "loss:sum":
                close(ours.metrics[name], value, name)
    # Beside each other: in a sum, terms of both signs may leave nearly nothing.
    losses = [
        [result.loss for result in results if isinstance(result, ForwardBackwardOutput)]
        for results in (group, alone)
    ]
    close(*losses, "losses")
    return group


def job(name: str, data: Sequence[Datum], loss_fn: str = "cross_entropy") -> ForwardBackwardJob:
    return ForwardBackwardJob(
        adapter_name=name, data=data, loss_fn=loss_fn, loss_fn_config=SETTINGS.get(loss_fn, {})
    )


@pytest.mark.parametrize("loss_fn", LOSS_FNS)
def test_every_loss_of_several_adapters_in_one_pass(
    adapters: Pair, make_datum: MakeDatum, loss_fn: str
) -> None:
    data = [make_datum(length, seed, loss_fn=loss_fn) for seed, length in enumerate(RAGGED)]
    same_results(adapters, [job(name, data[n:], loss_fn) for n, name in enumerate(ADAPTERS)])
    for name in ADAPTERS:
        adapters.same(name)
        for engine in adapters.both():
            engine.trainer.optim_step(name, STEP)
        adapters.same(name)


def test_a_pass_of_one_short_datum(adapters: Pair, make_datum: MakeDatum) -> None:
    for length in (1, 5):
        same_results(adapters, [job("wide", [make_datum(length)])])
    adapters.same("wide")


def test_several_requests_of_one_adapter(adapters: Pair, make_datum: MakeDatum) -> None:
    jobs = [job("wide", [make_datum(length, 5)]) for length in (4, 11, 30)]
    same_results(adapters, jobs)
    adapters.same("wide")


@in_both_dtypes
def test_batch_mates_do_not_change_the_bits(adapters: Pair, make_datum: MakeDatum) -> None:
    """What is computed first together, and after a crash alone, has the same gradient."""
    trainer = adapters.group.trainer
    own = [job("wide", [make_datum(n, 7) for n in lengths]) for lengths in ((30, 9), (3,), (14, 5))]
    others = [job("narrow", [make_datum(22)]), job("headless", [make_datum(8), make_datum(31)])]
    together = trainer.forward_backward([others[0], *own, others[1]])
    grad = trainer.adapter_state("wide")["grad"]
    trainer.drop_gradient("wide")
    alone = [result for each in own for result in trainer.forward_backward([each])]
    np.testing.assert_array_equal(trainer.adapter_state("wide")["grad"], grad)
    for ours, theirs in zip(alone, together[1:4], strict=True):
        assert isinstance(ours, ForwardBackwardOutput)
        assert isinstance(theirs, ForwardBackwardOutput)
        assert ours.loss == theirs.loss
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_long_pass_that_computes_its_activations_twice(
    adapters: Pair, make_datum: MakeDatum
) -> None:
    data = [make_datum(60, seed) for seed in range(20)]
    same_results(adapters, [job("headless", data), job("wide", data[:3])])
    adapters.same("headless")


def test_scoring_leaves_the_gradient(adapters: Pair, make_datum: MakeDatum) -> None:
    data = [make_datum(length) for length in (7, 20, 33)]
    scored = ForwardBackwardJob(
        adapter_name="wide", data=data, loss_fn="cross_entropy", forward_only=True
    )
    same_results(adapters, [scored, job("narrow", data)])
    adapters.same("wide")


def test_a_shared_prompt(adapters: Pair, make_datum: MakeDatum) -> None:
    first = make_datum(40, 1)
    data = []
    for seed in range(6):
        datum = make_datum(48, seed)
        tokens = np.concatenate([first.model_input[:32], datum.model_input[32:]])
        data.append(Datum(model_input=tokens, loss_fn_inputs=datum.loss_fn_inputs))
    same_results(adapters, [job("wide", data)])
    adapters.same("wide")


def test_many_targets_for_each_token(adapters: Pair, make_datum: MakeDatum) -> None:
    data = [make_datum(9, n, num_targets=3) for n in range(3)]
    same_results(adapters, [job("narrow", data)])
    adapters.same("narrow")


def test_a_bad_request_fails_alone(adapters: Pair, make_datum: MakeDatum) -> None:
    good = [make_datum(length) for length in (7, 20, 33)]
    bad = make_datum(6, loss_fn="importance_sampling")
    inputs = {
        **bad.loss_fn_inputs,
        "logprobs": np.full(6, -1e30, np.float32),
        "advantages": np.ones(6, np.float32),
    }
    overflows = Datum(model_input=bad.model_input, loss_fn_inputs=inputs)
    outside = Datum(
        model_input=np.full(3, 10_000, np.int32), loss_fn_inputs=make_datum(3).loss_fn_inputs
    )
    results = same_results(
        adapters,
        [
            job("wide", good),
            job(
                "wide",
                [make_datum(4, loss_fn="importance_sampling"), overflows],
                "importance_sampling",
            ),
            job("narrow", [outside]),
            job("unknown", good),
            job("narrow", good),
        ],
    )
    kinds = [type(result) for result in results]
    assert kinds[1:4] == [NonFiniteResult, InvalidDatum, InvalidRequest]
    adapters.same("wide")
    adapters.same("narrow")


def test_training_moves_between_two_ranks_and_one(
    adapters: Pair, make_datum: MakeDatum, tmp_path: Path
) -> None:
    """Whoever trains next, the losses are those of a run that stayed in one process."""
    data = [make_datum(length, 3) for length in RAGGED]
    alone, group = (engine.trainer for engine in adapters.both())
    alone.save_adapter("wide", tmp_path / "0")
    for turn, trainer in enumerate((group, alone, group, group, alone)):
        trainer.load_adapter("run", tmp_path / str(turn))
        (moved,) = trainer.forward_backward([job("run", data)])
        (stayed,) = alone.forward_backward([job("wide", data)])
        assert isinstance(moved, ForwardBackwardOutput)
        assert isinstance(stayed, ForwardBackwardOutput)
        close(moved.loss, stayed.loss, f"loss of turn {turn}")
        if turn != 2:  # then it moves with a gradient that has not been stepped
            trainer.optim_step("run", STEP)
            alone.optim_step("wide", STEP)
        trainer.save_adapter("run", tmp_path / str(turn + 1))
    alone.load_adapter("run", tmp_path / "5")
    ours, theirs = alone.adapter_state("run"), alone.adapter_state("wide")
    close(ours["weights"], theirs["weights"], "weights")


def test_an_adapter_is_created_the_same_and_exported(adapters: Pair, tmp_path: Path) -> None:
    for number, engine in enumerate(adapters.both()):
        engine.trainer.create_adapter("new", LoraConfig(rank=4, seed=9))
        engine.trainer.save_peft("wide", tmp_path / str(number))
        engine.trainer.import_adapter("imported", tmp_path / "0")
    adapters.same("new")
    adapters.same("imported")
    exports = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "01"]
    assert exports[0] == exports[1]


def test_a_refusal_is_the_same_on_all_ranks_and_harms_nothing(
    adapters: Pair, make_datum: MakeDatum, tmp_path: Path
) -> None:
    trainer = adapters.group.trainer
    with pytest.raises(InvalidRequest, match="resident already"):
        trainer.create_adapter("wide", LoraConfig())
    with pytest.raises(CheckpointNotFound):
        trainer.load_adapter("wide", tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="No adapter named"):
        trainer.optim_step("nobody", STEP)
    same_results(adapters, [job("wide", [make_datum(5)])])


def test_a_dropped_gradient_is_gone_everywhere(adapters: Pair, make_datum: MakeDatum) -> None:
    same_results(adapters, [job("wide", [make_datum(20)])])
    for engine in adapters.both():
        engine.trainer.drop_gradient("wide")
    same_results(adapters, [job("wide", [make_datum(9)])])
    adapters.same("wide")


def test_a_clients_own_loss(adapters: Pair, make_datum: MakeDatum) -> None:
    def loss(logprobs, weights):
        total = (logprobs.exp() * weights).sum()
        return total, {"custom/total:mean": total.detach()}

    handle = trace_loss(loss, {"logprobs": 1, "weights": 1}, "session")
    body = json.loads(json.dumps(encode_graph(handle).model_dump()))
    graph = check_graph(handle.name, [item.model_dump() for item in handle.inputs], body)
    data = [make_datum(length, 1) for length in (9, 30, 4)]
    same_results(
        adapters,
        [
            ForwardBackwardJob(adapter_name="wide", data=data, loss_fn="custom", custom_loss=graph),
            job("narrow", data),
        ],
    )
    adapters.same("wide")
