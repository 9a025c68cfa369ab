"""Effects of a request on other requests, on its adapter and on the base model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.engine.interface import ForwardBackwardJob
from training.engine.torch.adapters import AdapterLayout, LoraShape
from training.engine.torch.target_modules import select_modules
from training.errors import (
    GradientDropped,
    InvalidDatum,
    InvalidRequest,
    NonFiniteResult,
)
from training.types import MAX_FLOAT32, AdamParams, Datum, ForwardBackwardOutput, LoraConfig

STEP = AdamParams(learning_rate=0.01)


def job(adapter_name, *data, loss_fn="cross_entropy", **kwargs):
    return ForwardBackwardJob(adapter_name=adapter_name, data=data, loss_fn=loss_fn, **kwargs)


def poisoned(datum, **inputs):
    return Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, **inputs})


def overflowing(make_datum):
    """A datum that passes every check and whose ratio exp(lp - q) is infinite."""
    datum = make_datum(6, loss_fn="ppo")
    return poisoned(datum, logprobs=np.full(6, -1e4, np.float32))


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture
def engine_with_two(make_engine):
    """A factory of engines with adapters ``a`` and ``b`` whose weights are not trivial."""

    def make(**kwargs):
        engine = make_engine(**kwargs)
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.create_adapter("b", LoraConfig(rank=2, train_mlp=False, seed=1))
        engine.randomise("a", seed=1)
        engine.randomise("b", seed=2)
        return engine

    return make


def test_a_new_adapter_changes_nothing_and_has_no_gradient(engine, make_datum):
    engine.create_adapter("a", LoraConfig(rank=4))
    state = engine.adapter_state("a")
    assert state["weights"].any()
    assert not state["grad"].any()
    assert not state["exp_avg"].any()
    assert state["step"] == 0
    engine.create_adapter("b", LoraConfig(rank=2, seed=5))
    datum = make_datum(9)
    first, second = engine.forward_backward([job("a", datum), job("b", datum)])
    np.testing.assert_array_equal(first.logprobs[0], second.logprobs[0])


def test_initial_weights_depend_on_seed_and_module_alone(engine):
    engine.create_adapter("all", LoraConfig(rank=4, seed=3))
    engine.create_adapter("some", LoraConfig(rank=4, seed=3, train_attn=False))
    engine.create_adapter("other", LoraConfig(rank=4, seed=4))
    name = "model.layers.1.mlp.up_proj"

    def matrix(adapter_name):
        flat = torch.from_numpy(engine.adapter_state(adapter_name)["weights"])
        return engine.layout_of(adapter_name).pair(flat, name)[0]

    assert torch.equal(matrix("all"), matrix("some"))
    assert not torch.equal(matrix("all"), matrix("other"))
    assert matrix("all").abs().max() <= 16**-0.5


def test_the_base_model_is_bit_identical_after_training(engine, make_datum, tied_base_model):
    def bits():
        return {
            name: parameter.clone()
            for name, parameter in tied_base_model._decoder.named_parameters()
        }

    before = bits()
    engine.create_adapter("a", LoraConfig(rank=4))
    for seed in range(3):
        engine.train_one("a", [make_datum(9, seed=seed)])
        engine.optim_step("a", STEP)
    after = bits()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    assert all(p.grad is None for p in tied_base_model._decoder.parameters())


def train_three_steps(engine, batches):
    """Each batch maps adapter names to one datum; one pass and one step of each per batch."""
    for batch in batches:
        engine.forward_backward([job(name, datum) for name, datum in batch.items()])
        for name in batch:
            engine.optim_step(name, AdamParams(learning_rate=0.01, eps=0.1))


def test_two_tenants_in_turns_are_to_the_bit_two_alone(engine_with_two, make_datum):
    in_turns, alone = engine_with_two(), engine_with_two()
    data = [make_datum(5 + n, seed=n) for n in range(3)]
    train_three_steps(in_turns, [{name: datum} for datum in data for name in ("a", "b")])
    train_three_steps(alone, [{name: datum} for name in ("a", "b") for datum in data])
    for name in ("a", "b"):
        assert_same_state(in_turns.adapter_state(name), alone.adapter_state(name))


def test_two_tenants_in_one_batch_are_two_alone(engine_with_two, make_datum):
    together, alone = engine_with_two(), engine_with_two()
    data = [make_datum(5 + n, seed=n) for n in range(3)]
    train_three_steps(together, [{"a": datum, "b": datum} for datum in data])
    train_three_steps(alone, [{name: datum} for name in ("a", "b") for datum in data])
    for name in ("a", "b"):
        ours, theirs = together.adapter_state(name), alone.adapter_state(name)
        # Three steps move a weight by up to 0.03.
        np.testing.assert_allclose(ours["weights"], theirs["weights"], atol=3e-4)


def test_a_tenants_optimizer_step_touches_nobody_else(engine_with_two, make_datum):
    engine = engine_with_two()
    engine.forward_backward([job("a", make_datum(5)), job("b", make_datum(5))])
    before = engine.adapter_state("b")
    engine.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert_same_state(engine.adapter_state("b"), before)


def test_forward_never_changes_a_gradient_and_computes_the_same(engine_with_two, make_datum):
    engine = engine_with_two()
    trained = engine.train_one("a", [make_datum(5), make_datum(8)])
    before = engine.adapter_state("a")
    scored = engine.train_one("a", [make_datum(5), make_datum(8)], forward_only=True)
    assert_same_state(engine.adapter_state("a"), before)
    assert scored.loss == pytest.approx(trained.loss, rel=1e-6)
    np.testing.assert_allclose(scored.logprobs[1], trained.logprobs[1], atol=1e-5)


def test_forward_without_weights_counts_every_token_once(engine_with_two, make_datum):
    targets = {"target_tokens": make_datum(5).loss_fn_inputs["target_tokens"]}
    datum = Datum(model_input=make_datum(5).model_input, loss_fn_inputs=targets)
    output = engine_with_two().train_one("a", [datum], forward_only=True)
    assert output.loss == pytest.approx(-output.logprobs[0].sum(), rel=1e-5)


def test_a_bad_job_fails_by_name_and_its_mates_are_as_without_it(engine_with_two, make_datum):
    good = [job("a", make_datum(5)), job("b", make_datum(9)), job("a", make_datum(7))]
    bad = {
        0: job("a", poisoned(make_datum(5), weights=np.ones(4, np.float32))),
        2: job("nobody", make_datum(5)),
        3: job("b", overflowing(make_datum), loss_fn="ppo"),
        5: job("a", make_datum(3), loss_fn="mse"),
    }
    clean, mixed = engine_with_two(), engine_with_two()
    expected = clean.forward_backward(good)
    results = mixed.forward_backward([bad[0], good[0], bad[2], bad[3], good[1], bad[5], good[2]])
    assert isinstance(results[0], InvalidDatum)
    assert str(results[0]) == "data[0].loss_fn_inputs.weights: 4 values for 5 tokens"
    assert str(results[2]) == "No adapter named nobody is resident."
    assert isinstance(results[3], NonFiniteResult)
    assert isinstance(results[5], InvalidRequest)
    for ours, theirs in zip([results[1], results[4], results[6]], expected, strict=True):
        assert isinstance(ours, ForwardBackwardOutput)
        assert ours.loss == theirs.loss
        np.testing.assert_array_equal(ours.logprobs[0], theirs.logprobs[0])
    for name in ("a", "b"):
        assert_same_state(mixed.adapter_state(name), clean.adapter_state(name))


def test_a_non_finite_job_spares_its_own_adapters_other_jobs(engine_with_two, make_datum):
    clean, mixed = engine_with_two(token_budget=8), engine_with_two(token_budget=8)
    good = [job("a", make_datum(5, loss_fn="ppo"), loss_fn="ppo"), job("a", make_datum(4))]
    clean.forward_backward(good)
    results = mixed.forward_backward(
        [good[0], job("a", make_datum(5), overflowing(make_datum), loss_fn="ppo"), good[1]]
    )
    # A datum of cross_entropy in a ppo job: refused before anything runs.
    assert isinstance(results[1], InvalidDatum)
    results = mixed.forward_backward([job("a", overflowing(make_datum), loss_fn="ppo")])
    assert isinstance(results[0], NonFiniteResult)
    assert_same_state(mixed.adapter_state("a"), clean.adapter_state("a"))


def test_a_gradient_that_overflows_is_found_in_the_job_it_comes_from(engine_with_two, make_datum):
    huge = make_datum(6)
    huge = poisoned(huge, weights=np.full(6, 3e37, np.float32))
    engine, clean = engine_with_two(), engine_with_two()
    results = engine.forward_backward([job("a", make_datum(5)), job("a", huge)])
    (expected,) = clean.forward_backward([job("a", make_datum(5))])
    assert results[0].loss == expected.loss
    assert isinstance(results[1], NonFiniteResult)
    assert_same_state(engine.adapter_state("a"), clean.adapter_state("a"))


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_huge_gradients_are_dropped_with_the_step_that_they_spoil(
    size, engine_with_two, make_datum
):
    """One bad batch, or a sum: the next good batch continues from weights and moments."""
    engine, clean = engine_with_two(), engine_with_two()
    for one in (engine, clean):
        one.train_one("a", [make_datum(5)])
        one.optim_step("a", STEP)
    huge = poisoned(make_datum(6), weights=np.full(6, size, np.float32))
    for _ in range(3):
        engine.train_one("a", [huge])
    with pytest.raises(GradientDropped):
        engine.optim_step("a", STEP)
    for one in (engine, clean):
        one.train_one("a", [make_datum(7)])
        one.optim_step("a", STEP)
    assert_same_state(engine.adapter_state("a"), clean.adapter_state("a"))


def test_a_sum_of_gradients_that_overflows_is_refused_and_the_sum_before_stays(
    engine_with_two, make_datum
):
    engine = engine_with_two()
    weights = np.full(6, 1e33, np.float32)
    engine.train_one("a", [poisoned(make_datum(6), weights=weights)])
    largest = np.abs(engine.grad("a")).max()
    engine.scale_grad("a", float(MAX_FLOAT32 / largest) * 0.9999)
    before = engine.adapter_state("a")
    weights = np.full(6, 1e36, np.float32)
    (result,) = engine.forward_backward([job("a", poisoned(make_datum(6), weights=weights))])
    assert isinstance(result, NonFiniteResult)
    assert "added to the accumulated one, is outside float32" in str(result)
    assert_same_state(engine.adapter_state("a"), before)
    assert engine.optim_step("a", AdamParams(grad_clip_norm=1.0)).step == 1


def test_an_adapter_whose_weights_overflow_fails_alone(engine_with_two, make_datum):
    engine, clean = engine_with_two(), engine_with_two()
    flat = engine.adapter_state("b")["weights"]
    engine.set_weights("b", np.full_like(flat, 1e30))
    before = engine.adapter_state("b")
    results = engine.forward_backward([job("a", make_datum(5)), job("b", make_datum(5))])
    (expected,) = clean.forward_backward([job("a", make_datum(5))])
    assert results[0].loss == expected.loss
    assert isinstance(results[1], NonFiniteResult)
    assert_same_state(engine.adapter_state("a"), clean.adapter_state("a"))
    assert_same_state(engine.adapter_state("b"), before)


def test_a_pass_that_breaks_half_way_leaves_everything_as_before(
    engine_with_two, make_datum, monkeypatch
):
    engine = engine_with_two(token_budget=6)
    engine.forward_backward([job("a", make_datum(5)), job("b", make_datum(5))])
    before = {name: engine.adapter_state(name) for name in ("a", "b")}
    passes = engine._base_model._decoder.forward
    calls = []

    def breaks_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return passes(*args, **kwargs)

    monkeypatch.setattr(engine._base_model._decoder, "forward", breaks_at_the_third)
    jobs = [job("a", make_datum(5), make_datum(6)), job("b", make_datum(5))]
    with pytest.raises(RuntimeError, match="device lost"):
        engine.forward_backward(jobs)
    for name, state in before.items():
        assert_same_state(engine.adapter_state(name), state)


def test_out_of_memory_refuses_only_the_job_that_is_too_large(
    engine_with_two, make_datum, monkeypatch
):
    engine, clean = engine_with_two(), engine_with_two()
    forward = engine._base_model._decoder.forward

    def small_device(*args, **kwargs):
        if kwargs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    expected = clean.forward_backward([job("a", make_datum(30)), job("b", make_datum(35))])
    monkeypatch.setattr(engine._base_model._decoder, "forward", small_device)
    results = engine.forward_backward(
        [job("a", make_datum(30)), job("b", make_datum(35)), job("a", make_datum(41))]
    )
    assert type(results[2]).__name__ == "OutOfMemory"
    for ours, theirs in zip(results, expected, strict=False):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name in ("a", "b"):
        np.testing.assert_allclose(engine.grad(name), clean.grad(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 15, 40])
def test_a_jobs_bits_do_not_tell_who_shared_its_batch(engine_with_two, make_datum, num_tokens):
    mine = [job("a", make_datum(num_tokens), make_datum(3), make_datum(20))]
    others = [job("b", make_datum(n), make_datum(n)) for n in (2, 30)]
    alone, shared = engine_with_two(token_budget=64), engine_with_two(token_budget=64)
    (expected,) = alone.forward_backward(mine)
    output = shared.forward_backward([others[0], *mine, others[1]])[1]
    assert output.loss == expected.loss
    for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_state(shared.adapter_state("a"), alone.adapter_state("a"))


@pytest.mark.parametrize("groups", [[3], [1, 2], [2, 1], [1, 1, 1]], ids=str)
def test_an_adapters_bits_do_not_tell_which_of_its_jobs_shared_a_call(
    engine_with_two, make_datum, groups
):
    jobs = [job("a", make_datum(n), make_datum(n + 3, seed=n)) for n in (4, 17, 1)]
    alone, grouped = engine_with_two(token_budget=32), engine_with_two(token_budget=32)
    expected = [alone.forward_backward([one])[0] for one in jobs]
    rest, outputs = iter(jobs), []
    for size in groups:
        call = [next(rest) for _ in range(size)]
        outputs += grouped.forward_backward([job("b", make_datum(9)), *call])[1:]
    assert [output.loss for output in outputs] == [output.loss for output in expected]
    assert_same_state(grouped.adapter_state("a"), alone.adapter_state("a"))


def test_where_kernels_differ_an_adapters_jobs_are_summed_in_one_go(engine_with_two, make_datum):
    jobs = [job("a", make_datum(n)) for n in (4, 17, 1)]
    bad = poisoned(make_datum(6), weights=np.full(6, 3e37, np.float32))
    each, merged = engine_with_two(), engine_with_two()
    merged._sums_by_job = False  # as on a GPU
    each.forward_backward(jobs)
    outputs = merged.forward_backward([*jobs, job("a", bad)])
    assert isinstance(outputs[3], NonFiniteResult)
    np.testing.assert_allclose(merged.grad("a"), each.grad("a"), rtol=1e-4, atol=1e-5)


def test_a_taken_name_and_targets_that_match_nothing_are_refused(engine):
    engine.create_adapter("a", LoraConfig(rank=2))
    with pytest.raises(InvalidRequest, match="An adapter named a is resident already"):
        engine.create_adapter("a", LoraConfig(rank=2))
    with pytest.raises(InvalidRequest, match="'w_proj' matches nothing; known: down_proj, gate"):
        engine.create_adapter("b", LoraConfig(target_modules=("q_proj", "w_proj")))
    assert engine.adapter_names() == ["a"]


def test_train_flags_choose_attention_mlp_and_head(tied_base_model):
    def chosen(**flags):
        config = LoraConfig(
            **{"train_attn": False, "train_mlp": False, "train_unembed": False, **flags}
        )
        modules = select_modules(config, tied_base_model.linear_shapes, "lm_head")
        return {name.rpartition(".")[2] for name in modules}

    assert chosen(train_attn=True) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert chosen(train_mlp=True) == {"gate_proj", "up_proj", "down_proj"}
    assert chosen(train_unembed=True) == {"lm_head"}


def test_an_adapters_memory_is_four_buffers_of_its_parameters(engine):
    config = LoraConfig(rank=2, target_modules=("down_proj",))
    num_parameters = 2 * 2 * (32 + 16)
    assert engine.adapter_bytes(config) == 4 * 4 * num_parameters
    assert engine.adapter_bytes(config, with_optimizer=False) == 4 * num_parameters
    engine.create_adapter("a", config)
    state = engine.adapter_state("a")
    assert sum(state[name].nbytes for name in ("weights", "grad", "exp_avg", "exp_avg_sq")) == (
        engine.adapter_bytes(config)
    )


def test_an_adapter_of_a_narrower_base_model_is_kept_in_its_dtype_too():
    layout = AdapterLayout(LoraConfig(rank=2), {"down_proj": LoraShape(32, 16)})
    assert layout.num_bytes(torch.bfloat16) == (4 * 4 + 2) * layout.num_parameters
    assert layout.num_bytes(torch.bfloat16, with_optimizer=False) == 6 * layout.num_parameters
