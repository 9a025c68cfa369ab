"""Loss and every adapter gradient against an independent computation with transformers and peft."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.reference import PeftReference
from training.engine.interface import ForwardBackwardJob
from training.types import LoraConfig

CONFIGS = {
    "everything": LoraConfig(rank=4, alpha=8.0),
    "attention": LoraConfig(rank=1, alpha=2.0, train_mlp=False, train_unembed=False),
    "mlp": LoraConfig(rank=3, alpha=32.0, train_attn=False, train_unembed=False),
    "head": LoraConfig(rank=5, alpha=5.0, train_attn=False, train_mlp=False),
    "named": LoraConfig(rank=2, alpha=1.0, target_modules=("q_proj", "down_proj")),
    "last layer": LoraConfig(rank=2, target_modules=("model.layers.1.mlp.up_proj",)),
}


WIDE = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e9}


def assert_close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradient_are_those_of_peft(
    config, tied, make_engine, make_datum, tied_folder, untied_folder
):
    engine = make_engine(tied=tied)
    engine.create_adapter("a", config)
    engine.randomise("a")
    data = [make_datum(7), make_datum(12), make_datum(1), make_datum(12, seed=1)]
    reference = PeftReference(tied_folder if tied else untied_folder, engine, "a")

    output = engine.train_one("a", data)

    losses = []
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        expected = reference.logprobs(datum)
        weights = torch.from_numpy(datum.loss_fn_inputs["weights"])[:, None]
        loss = -(weights * expected).sum()
        loss.backward()
        losses.append(loss.item())
        np.testing.assert_allclose(logprobs, expected[:, 0].detach(), rtol=1e-5, atol=1e-5)
    assert output.loss == pytest.approx(sum(losses), rel=1e-5)
    assert output.metrics["loss:sum"] == output.loss
    assert_close(engine.grad("a"), reference.grad())


def test_many_targets_per_token_are_those_of_peft(engine, make_datum, tied_folder):
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    data = [make_datum(9, num_targets=3), make_datum(5), make_datum(4, num_targets=2)]
    reference = PeftReference(tied_folder, engine, "a")

    output = engine.train_one("a", data)

    for datum, logprobs in zip(data, output.logprobs, strict=True):
        expected = reference.logprobs(datum)
        weights = torch.from_numpy(datum.loss_fn_inputs["weights"]).reshape(expected.shape)
        (-(weights * expected).sum()).backward()
        assert logprobs.shape == datum.loss_fn_inputs["target_tokens"].shape
        np.testing.assert_allclose(
            logprobs, expected.detach().reshape(logprobs.shape), rtol=1e-5, atol=1e-5
        )
    assert_close(engine.grad("a"), reference.grad())


def test_a_batch_of_many_adapters_and_losses_is_each_job_alone(make_engine, make_datum):
    configs = {"a": LoraConfig(rank=4), "b": LoraConfig(rank=2, train_mlp=False, seed=1)}
    jobs = [
        ForwardBackwardJob(adapter_name=name, data=data, loss_fn=loss_fn, loss_fn_config=config)
        for name, loss_fn, data, config in [
            ("a", "cross_entropy", [make_datum(5), make_datum(9, num_targets=2)], {}),
            ("b", "ppo", [make_datum(6, loss_fn="ppo")], {"clip_high_threshold": 2.0}),
            ("b", "ppo", [make_datum(4, loss_fn="ppo"), make_datum(6, loss_fn="ppo")], {}),
            ("a", "dro", [make_datum(3, loss_fn="dro")], {"beta": 0.1}),
            ("a", "gspo", [make_datum(7, loss_fn="gspo"), make_datum(4, loss_fn="gspo")], WIDE),
            ("b", "cross_entropy", [make_datum(2)], {}),
        ]
    ]

    def fresh():
        engine = make_engine()
        for name, config in configs.items():
            engine.create_adapter(name, config)
            engine.randomise(name)
        return engine

    together, alone = fresh(), fresh()
    outputs = together.forward_backward(jobs)
    for job, output in zip(jobs, outputs, strict=True):
        (expected,) = alone.forward_backward([job])
        assert output.loss == pytest.approx(expected.loss, rel=1e-5)
        for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in configs:
        assert_close(together.grad(name), alone.grad(name))


@pytest.mark.parametrize("token_budget", [1, 10, 23])
def test_the_token_budget_changes_no_result(token_budget, make_engine, make_datum):
    data = [make_datum(n, seed=n) for n in (3, 11, 7, 11, 5)]
    results = []
    for budget in (token_budget, 4096):
        engine = make_engine(token_budget=budget)
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
        results.append((engine.train_one("a", data), engine.grad("a")))
    (small, small_grad), (large, large_grad) = results
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    for ours, theirs in zip(small.logprobs, large.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_close(small_grad, large_grad)


def test_the_head_in_small_chunks_is_the_head_at_once(make_engine, make_datum, monkeypatch):
    data = [make_datum(n, seed=n) for n in (3, 11, 7)]
    grads = []
    for chunk_bytes in (64 * 2**20, 5 * 4 * 259):
        monkeypatch.setattr("training.engine.torch.lm_head.CHUNK_BYTES", chunk_bytes)
        engine = make_engine()
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.create_adapter("b", LoraConfig(rank=3))
        engine.randomise("a")
        engine.randomise("b")
        jobs = [
            ForwardBackwardJob(adapter_name=name, data=data, loss_fn="cross_entropy")
            for name in ("a", "b")
        ]
        engine.forward_backward(jobs)
        grads.append(np.concatenate([engine.grad("a"), engine.grad("b")]))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 5 * 4 * 259])
def test_gspo_is_its_formula_over_whole_datums_however_the_head_is_cut(
    chunk_bytes, engine, make_datum, tied_folder, monkeypatch
):
    monkeypatch.setattr("training.engine.torch.lm_head.CHUNK_BYTES", chunk_bytes)
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    data = [make_datum(n, seed=n, loss_fn="gspo") for n in (11, 3, 11, 1)]
    data[1].loss_fn_inputs["logprobs"][:] -= 3.0  # a ratio that is clipped
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    reference = PeftReference(tied_folder, engine, "a")

    output = engine.train_one("a", data, loss_fn="gspo", loss_fn_config=config)

    total = 0.0
    for datum in data:
        logprobs = reference.logprobs(datum)[:, 0]
        given = {n: torch.from_numpy(v) for n, v in datum.loss_fn_inputs.items()}
        counted = given["sequence_ratio_mask"] != 0
        gap = (logprobs.detach() - given["logprobs"])[counted].mean() if counted.any() else 0.0
        ratio = torch.exp(gap + logprobs - logprobs.detach())
        clipped = torch.clamp(ratio, 0.5, 2.0)
        loss = -torch.minimum(ratio * given["advantages"], clipped * given["advantages"]).sum()
        loss.backward()
        total += loss.item()
    assert output.loss == pytest.approx(total, rel=1e-5)
    assert_close(engine.grad("a"), reference.grad())


def test_weights_times_two_double_the_gradient(engine, make_datum):
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.create_adapter("b", LoraConfig(rank=4))
    datum = make_datum(9)
    inputs = dict(datum.loss_fn_inputs)
    inputs["weights"] = 2 * inputs["weights"]
    engine.train_one("a", [datum])
    engine.train_one("b", [type(datum)(model_input=datum.model_input, loss_fn_inputs=inputs)])
    assert_close(engine.grad("b"), 2 * engine.grad("a"))


def test_a_datum_of_zero_weight_changes_no_gradient(engine, make_datum):
    engine.create_adapter("a", LoraConfig(rank=4))
    datum = make_datum(9)
    datum.loss_fn_inputs["weights"][:] = 0
    output = engine.train_one("a", [datum])
    assert output.loss == 0
    assert np.isfinite(output.logprobs[0]).all()
    assert not engine.grad("a").any()


def test_gradients_accumulate_over_calls(engine, make_datum, tied_folder):
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    engine.train_one("a", [make_datum(5)])
    first = engine.grad("a")
    engine.train_one("a", [make_datum(8)])
    both = engine.grad("a")
    engine.create_adapter("b", LoraConfig(rank=4))
    engine.randomise("b")
    engine.train_one("b", [make_datum(8)])
    assert_close(both - first, engine.grad("b"))
