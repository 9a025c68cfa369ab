"""The contract of every trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.contract.conftest import PROMPT
from training.engine.interface import Engine, ForwardBackwardJob, Trainer
from training.errors import (
    CheckpointExists,
    CheckpointNotFound,
    GradientDropped,
    InvalidDatum,
    InvalidRequest,
    NonFiniteResult,
    TrainingError,
)
from training.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig

MODERATE = AdamParams(learning_rate=0.1)
BUFFERS = ("weights", "exp_avg", "exp_avg_sq", "grad")

Same = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture
def trainer(engine: Engine) -> Trainer:
    """With adapters ``a`` and ``b``, each two steps from its beginning."""
    return engine.trainer


def datum(weight: float = 1.0, *, num_targets: int = 0) -> Datum:
    """N = 4 tokens; with ``num_targets`` K, (N, K) targets."""
    targets = np.array(PROMPT[1:], np.int64)
    if num_targets:
        targets = np.stack([(targets + k) % 256 for k in range(num_targets)], axis=1)
    return Datum(
        model_input=np.array(PROMPT[:-1], np.int32),
        loss_fn_inputs={
            "target_tokens": targets,
            "weights": np.full(targets.shape, weight, np.float32),
        },
    )


def job(name: str, *data: Datum, forward_only: bool = False) -> ForwardBackwardJob:
    return ForwardBackwardJob(
        adapter_name=name, data=data, loss_fn="cross_entropy", forward_only=forward_only
    )


def run(trainer: Trainer, *jobs: ForwardBackwardJob) -> list[ForwardBackwardOutput]:
    """Outputs of jobs that must all succeed."""
    outputs = trainer.forward_backward(jobs)
    assert all(isinstance(output, ForwardBackwardOutput) for output in outputs), outputs
    return outputs  # type: ignore[return-value]  # asserted above


# -- adapters ------------------------------------------------------------------------------------


def test_a_new_adapter_has_weights_and_no_history(trainer: Trainer) -> None:
    config = LoraConfig(rank=2, seed=7)
    trainer.create_adapter("c", config)
    state = trainer.adapter_state("c")
    assert state["weights"].any()
    assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq", "grad"))
    assert state["step"] == 0
    assert {state[name].dtype for name in BUFFERS} == {np.dtype(np.float32)}
    assert {state[name].shape for name in BUFFERS} == {state["weights"].shape}
    assert state["weights"].ndim == 1
    assert trainer.adapter_bytes(config) == sum(state[name].nbytes for name in BUFFERS)
    assert trainer.adapter_bytes(config, with_optimizer=False) == state["weights"].nbytes


def test_an_adapter_depends_on_its_seed(trainer: Trainer) -> None:
    for name, seed in (("c", 7), ("d", 7), ("e", 8)):
        trainer.create_adapter(name, LoraConfig(rank=2, seed=seed))
    c, d, e = (trainer.adapter_state(name)["weights"] for name in "cde")
    np.testing.assert_array_equal(c, d)
    assert not np.array_equal(c, e)


def test_a_name_names_one_adapter(trainer: Trainer, same_state: Same) -> None:
    before = trainer.adapter_state("a")
    with pytest.raises(InvalidRequest, match="a is resident already"):
        trainer.create_adapter("a", LoraConfig(rank=2))
    same_state(trainer.adapter_state("a"), before)


def test_names_are_listed_least_recently_used_first(trainer: Trainer) -> None:
    trainer.create_adapter("c", LoraConfig(rank=2))
    run(trainer, job("a", datum()))
    trainer.optim_step("b", MODERATE)
    assert trainer.adapter_names() == ["c", "a", "b"]
    trainer.drop_adapter("a")
    trainer.drop_adapter("never was")
    assert trainer.adapter_names() == ["c", "b"]


@pytest.mark.parametrize(
    "verb",
    [
        lambda trainer, folder: trainer.optim_step("nobody", MODERATE),
        lambda trainer, folder: trainer.drop_gradient("nobody"),
        lambda trainer, folder: trainer.capture_adapter("nobody"),
        lambda trainer, folder: trainer.save_peft("nobody", folder / "c"),
        lambda trainer, folder: trainer.adapter_state("nobody"),
    ],
    ids=["optim_step", "drop_gradient", "capture", "save_peft", "state"],
)
def test_an_adapter_that_is_not_there_is_refused_by_name(
    trainer: Trainer, tmp_path: Path, verb: Callable[[Trainer, Path], object]
) -> None:
    with pytest.raises(InvalidRequest, match="No adapter named nobody is resident"):
        verb(trainer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_a_copy(trainer: Trainer, same_state: Same) -> None:
    before = trainer.adapter_state("a")
    for name in BUFFERS:
        trainer.adapter_state("a")[name].fill(9.0)
    same_state(trainer.adapter_state("a"), before)


# -- passes --------------------------------------------------------------------------------------


def test_there_is_one_output_per_job_with_a_logprob_per_target(trainer: Trainer) -> None:
    outputs = run(trainer, job("a", datum(), datum(num_targets=3)), job("b", datum()))
    assert [[lp.shape for lp in output.logprobs] for output in outputs] == [[(4,), (4, 3)], [(4,)]]
    for output in outputs:
        assert {lp.dtype for lp in output.logprobs} == {np.dtype(np.float32)}
        total = sum(float(lp.sum()) for lp in output.logprobs)  # every weight is 1
        assert output.loss == pytest.approx(-total, rel=1e-4)


def test_an_adapter_is_computed_as_without_its_batch_mates(
    trainer: Trainer, same_state: Same
) -> None:
    run(trainer, job("a", datum()))
    alone = trainer.adapter_state("a")
    trainer.drop_gradient("a")
    run(trainer, job("b", datum()), job("a", datum()), job("b", datum(2.0)))
    same_state(trainer.adapter_state("a"), alone)


def test_gradients_are_of_the_sum_and_add_up(trainer: Trainer) -> None:
    grads = []
    jobs: Sequence[Sequence[ForwardBackwardJob]]
    for jobs in (
        [[job("a", datum()), job("a", datum())]],
        [[job("a", datum())], [job("a", datum())]],
        [[job("a", datum(2.0))]],
        [[job("a", datum(), datum())]],
    ):
        for together in jobs:
            run(trainer, *together)
        grads.append(trainer.adapter_state("a")["grad"])
        trainer.drop_gradient("a")
    assert grads[0].any()
    for grad in grads[1:]:
        # The fake rounds each token's share to 2 ** -10.
        np.testing.assert_allclose(grad, grads[0], rtol=1e-4, atol=2**-7)


def test_forward_computes_the_same_and_leaves_the_gradient_alone(
    trainer: Trainer, same_state: Same
) -> None:
    before = trainer.adapter_state("a")
    (scored,) = run(trainer, job("a", datum(), forward_only=True))
    same_state(trainer.adapter_state("a"), before)
    (trained,) = run(trainer, job("a", datum()))
    np.testing.assert_allclose(scored.logprobs[0], trained.logprobs[0], atol=1e-5)
    assert trainer.adapter_state("a")["grad"].any()


def test_a_bad_job_fails_by_name_and_its_mates_are_as_if_it_had_not_been_there(
    trainer: Trainer, same_state: Same
) -> None:
    run(trainer, job("a", datum()))
    expected = trainer.adapter_state("a")
    trainer.drop_gradient("a")
    good, nobody = job("a", datum()), job("nobody", datum())
    short = Datum(
        model_input=np.array([1, 2], np.int32),
        loss_fn_inputs={**datum().loss_fn_inputs, "target_tokens": np.array([1], np.int64)},
    )
    results = trainer.forward_backward([job("a", datum(), short), good, nobody])
    assert isinstance(results[0], InvalidDatum)
    assert "data[1]" in str(results[0])
    assert isinstance(results[1], ForwardBackwardOutput)
    assert isinstance(results[2], InvalidRequest)
    same_state(trainer.adapter_state("a"), expected)


# -- steps ---------------------------------------------------------------------------------------


def test_a_step_counts_clears_the_gradient_and_says_its_norm(trainer: Trainer) -> None:
    run(trainer, job("a", datum()))
    before = trainer.adapter_state("a")
    output = trainer.optim_step("a", MODERATE)
    after = trainer.adapter_state("a")
    assert output.step == after["step"] == before["step"] + 1
    assert output.grad_norm == pytest.approx(np.linalg.norm(before["grad"]), rel=1e-5)
    assert not after["grad"].any()
    # AdamW by its formula.
    p, t = MODERATE, output.step
    m = p.beta1 * before["exp_avg"] + (1 - p.beta1) * before["grad"]
    v = p.beta2 * before["exp_avg_sq"] + (1 - p.beta2) * before["grad"] ** 2
    update = m / (1 - p.beta1**t) / (np.sqrt(v / (1 - p.beta2**t)) + p.eps)
    moved = v > 1e-12  # elsewhere a quotient of two numbers of nearly nothing
    expected = before["weights"] - p.learning_rate * update
    np.testing.assert_allclose(after["weights"][moved], expected[moved], rtol=1e-3, atol=1e-5)


def test_without_a_gradient_decay_and_momentum_still_act(trainer: Trainer) -> None:
    before = trainer.adapter_state("a")
    output = trainer.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert output.grad_norm == 0.0
    assert not np.array_equal(trainer.adapter_state("a")["weights"], before["weights"])


def test_a_gradient_that_no_step_can_take_is_dropped_and_nothing_else(
    trainer: Trainer, same_state: Same
) -> None:
    before = trainer.adapter_state("a")
    run(trainer, job("a", datum(1e30)))
    with pytest.raises(GradientDropped):
        trainer.optim_step("a", MODERATE)
    same_state(trainer.adapter_state("a"), before)


def test_dropping_a_gradient_is_what_that_step_did(trainer: Trainer, same_state: Same) -> None:
    before = trainer.adapter_state("a")
    run(trainer, job("a", datum()))
    trainer.drop_gradient("a")
    same_state(trainer.adapter_state("a"), before)


def test_a_step_that_would_not_be_finite_changes_nothing(
    trainer: Trainer, same_state: Same
) -> None:
    run(trainer, job("a", datum()))
    before = trainer.adapter_state("a")
    with pytest.raises(NonFiniteResult):
        trainer.optim_step("a", AdamParams(learning_rate=1e30, weight_decay=1e30))
    same_state(trainer.adapter_state("a"), before)


@pytest.mark.parametrize("field", ["learning_rate", "beta1", "eps"])
def test_numbers_without_a_meaning_are_refused(
    trainer: Trainer, same_state: Same, field: str
) -> None:
    before = trainer.adapter_state("a")
    with pytest.raises(TrainingError, match=field):
        trainer.optim_step("a", AdamParams(**{field: float("nan")}))
    same_state(trainer.adapter_state("a"), before)


# -- files ---------------------------------------------------------------------------------------


def test_what_was_captured_is_written_by_another_thread_however_the_adapter_trains_on(
    trainer: Trainer, same_state: Same, tmp_path: Path
) -> None:
    run(trainer, job("a", datum()))
    before = trainer.adapter_state("a")
    captured = trainer.capture_adapter("a")
    run(trainer, job("a", datum(3.0)))
    trainer.optim_step("a", MODERATE)
    trainer.drop_adapter("a")
    with ThreadPoolExecutor(1) as thread:
        num_bytes = thread.submit(captured.write, tmp_path / "c").result()
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    trainer.load_adapter("again", tmp_path / "c")
    same_state(trainer.adapter_state("again"), before)


def test_a_capture_says_its_memory(trainer: Trainer) -> None:
    run(trainer, job("a", datum()))
    state = trainer.adapter_state("a")
    assert trainer.capture_adapter("a").num_bytes == sum(state[name].nbytes for name in BUFFERS)
    weights = trainer.capture_adapter("a", with_optimizer=False)
    assert weights.num_bytes == state["weights"].nbytes


def test_save_then_load_then_step_is_step(
    trainer: Trainer, same_state: Same, tmp_path: Path
) -> None:
    run(trainer, job("a", datum()))
    trainer.save_adapter("a", tmp_path / "c")
    trainer.load_adapter("again", tmp_path / "c")
    for name in ("a", "again"):
        run(trainer, job(name, datum(0.5)))
        trainer.optim_step(name, MODERATE)
    same_state(trainer.adapter_state("again"), trainer.adapter_state("a"))


def test_loading_returns_the_step_of_the_adapter(trainer: Trainer, tmp_path: Path) -> None:
    stepped = [trainer.optim_step("a", MODERATE).step for _ in range(3)]
    trainer.save_adapter("a", tmp_path / "c")

    assert trainer.load_adapter("again", tmp_path / "c") == stepped[-1] >= 3
    assert trainer.adapter_state("again")["step"] == stepped[-1]


def test_loading_over_an_adapter_replaces_it(
    trainer: Trainer, same_state: Same, tmp_path: Path
) -> None:
    trainer.save_adapter("a", tmp_path / "c")
    before = trainer.adapter_state("a")
    run(trainer, job("a", datum()))
    trainer.optim_step("a", MODERATE)
    trainer.load_adapter("a", tmp_path / "c")
    same_state(trainer.adapter_state("a"), before)


@pytest.mark.parametrize("saved_with_optimizer", [True, False])
def test_weights_alone_begin_a_new_optimizer(
    trainer: Trainer, tmp_path: Path, saved_with_optimizer: bool
) -> None:
    trainer.save_adapter("a", tmp_path / "c", with_optimizer=saved_with_optimizer)
    assert trainer.load_adapter("again", tmp_path / "c", with_optimizer=False) == 0
    loaded, original = trainer.adapter_state("again"), trainer.adapter_state("a")
    np.testing.assert_array_equal(loaded["weights"], original["weights"])
    assert loaded["step"] == 0
    assert not any(loaded[name].any() for name in ("exp_avg", "exp_avg_sq", "grad"))


def test_a_directory_that_is_no_checkpoint_loads_nothing(
    trainer: Trainer, same_state: Same, tmp_path: Path
) -> None:
    trainer.save_adapter("a", tmp_path / "weights", with_optimizer=False)
    trainer.save_adapter("a", tmp_path / "damaged")
    for path in (tmp_path / "damaged").iterdir():
        if path.name != "meta.json":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    before = trainer.adapter_state("a")
    for name in ("nowhere", "weights", "damaged"):
        with pytest.raises(CheckpointNotFound, match=name):
            trainer.load_adapter("a", tmp_path / name)
    same_state(trainer.adapter_state("a"), before)


def test_a_directory_that_exists_is_not_touched(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointExists):
        trainer.save_adapter("a", tmp_path / "c")
    with pytest.raises(CheckpointExists):
        trainer.save_peft("a", tmp_path / "c")
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]
    assert list((tmp_path / "c").iterdir()) == []


def test_an_export_has_the_names_that_peft_reads(trainer: Trainer, tmp_path: Path) -> None:
    num_bytes = trainer.save_peft("a", tmp_path / "c")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= sizes.keys()
    assert num_bytes == sum(sizes.values())


def test_an_export_that_is_imported_is_the_adapter_without_its_past(
    trainer: Trainer, tmp_path: Path
) -> None:
    trainer.save_peft("a", tmp_path / "files")
    config = trainer.import_adapter("imported", tmp_path / "files")
    assert config == LoraConfig(rank=2)
    state = trainer.adapter_state("imported")
    np.testing.assert_array_equal(state["weights"], trainer.adapter_state("a")["weights"])
    assert state["step"] == 0
    assert not any(state[name].any() for name in BUFFERS[1:])


def test_an_import_that_cannot_be_made_leaves_nothing(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        trainer.import_adapter("imported", tmp_path / "nowhere")
    trainer.save_peft("a", tmp_path / "files")
    with pytest.raises(InvalidRequest, match="resident already"):
        trainer.import_adapter("b", tmp_path / "files")
    (tmp_path / "files" / "adapter_config.json").unlink()
    with pytest.raises(InvalidRequest, match=r"adapter_config\.json: is missing"):
        trainer.import_adapter("imported", tmp_path / "files")
    assert "imported" not in trainer.adapter_names()
