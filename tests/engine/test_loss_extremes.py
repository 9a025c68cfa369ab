"""Losses of extreme inputs against their formulas in decimals, which overflow nowhere.

The reference knows no special case: it computes each formula as ``losses.md`` has it, with 25
digits and exponents without end. Where its number fits a float32, ours is that number; only where
it does not may ours be infinite or NaN.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.engine.torch.losses import LOSSES, LossInputs, loss_and_slope
from training.errors import NonFiniteResult
from training.loss_fns import LOSS_FNS
from training.types import MAX_FLOAT32, Datum, LoraConfig

FURTHEST = Decimal(10**6)
"""exp of this, and of anything beyond, is outside float32 after any multiplication."""

FILLER = -99999.0
"""The SDK's value for a missing log-probability."""


@pytest.fixture(autouse=True)
def numbers_below_the_normal_ones_are_kept():
    """A library that another test has loaded may have told the processor to drop them, and what is
    dropped may be multiplied by any number later."""
    torch.set_flush_denormal(False)


def reference(loss_fn, token, mean_gap=None):
    """(loss, derivative in lp) of one token, exactly; ``mean_gap`` is gspo's L."""
    d = {name: Decimal(value) for name, value in token.items()}
    lp, a = d["lp"], d.get("advantages", Decimal(0))
    if loss_fn == "cross_entropy":
        return -d["weights"] * lp, -d["weights"]
    gap = lp - d["logprobs"]
    if loss_fn == "dro":
        beta = d["beta"]
        return beta / 2 * gap * gap - lp * a, beta * gap - a
    gap = gap if mean_gap is None else mean_gap
    ratio = min(max(gap, -FURTHEST), FURTHEST).exp()
    if loss_fn == "importance_sampling":
        return -ratio * a, -ratio * a
    if loss_fn == "stable_reinforce":
        if a == 0:
            return a, a
        weight = min(ratio, Decimal(2))
        return weight * (d["kl_coeff"] / 2 * gap * gap - a * lp), weight * (d["kl_coeff"] * gap - a)
    clipped = min(max(ratio, d["clip_low_threshold"]), d["clip_high_threshold"])
    if loss_fn == "cispo":
        return -clipped * lp * a, -clipped * a
    smaller = min(ratio * a, clipped * a)
    return -smaller, -ratio * a if ratio * a <= clipped * a else Decimal(0)


def ours(loss_fn, tokens):
    def column(name):
        return torch.tensor([token[name] for token in tokens], dtype=torch.float32)[:, None]

    x = LossInputs(
        target_logprobs=column("lp"),
        inputs={name: column(name) for name in LOSS_FNS[loss_fn].float_inputs},
        config={name: tokens[0][name] for name in ("beta", "kl_coeff")},
    )
    loss, slope = loss_and_slope(loss_fn, x)
    assert loss.dtype == slope.dtype == torch.float32
    return loss[:, 0].tolist(), slope[:, 0].tolist()


def assert_is(actual, expected, scale):
    """The number that a float32 has for it; unless it has none, or only just has one."""
    size = abs(expected)
    if size < Decimal("0.999") * Decimal(MAX_FLOAT32):
        assert np.isfinite(actual), (actual, expected)
        rounding = Decimal("3e-5") * size + Decimal("1.2e-38") * scale
        assert abs(Decimal(actual) - expected) <= rounding, (actual, expected)
    elif size > Decimal("1.001") * Decimal(MAX_FLOAT32):
        assert not np.isfinite(actual), (actual, expected)


def float32s(lowest=-MAX_FLOAT32, highest=MAX_FLOAT32):
    usual = [0.0, 1.0, -1.0, 1e-30, -1e-30, 1e19, -1e20, 3e38, -3e38, highest, lowest]
    return st.sampled_from([v for v in usual if lowest <= v <= highest]) | st.floats(
        lowest, highest, width=32
    )


@st.composite
def tokens(draw):
    thresholds = sorted([draw(float32s()), draw(float32s())])
    return {
        "lp": draw(
            st.sampled_from([-0.0, -1e-30, -5.0, -90.0, -1e5]) | st.floats(-200, 0, width=32)
        ),
        "logprobs": draw(
            st.sampled_from([0.0, -5.0, -60.0, -95.0, -150.0, -1e3, FILLER, 1e30, -1e30])
            | st.floats(-200, 50, width=32)
            | float32s()
        ),
        "advantages": draw(float32s()),
        "weights": draw(float32s()),
        "clip_low_threshold": thresholds[0],
        "clip_high_threshold": thresholds[1],
        "sequence_ratio_mask": draw(st.sampled_from([0.0, 1.0])),
        "beta": draw(float32s()),
        "kl_coeff": draw(float32s(0.0)),
    }


def as_float32(token):
    return {name: float(np.float32(value)) for name, value in token.items()}


def is_on_a_threshold(token, gap):
    """Whether rounding decides on which side of a threshold the ratio is."""
    ratio = min(max(gap, -FURTHEST), FURTHEST).exp()
    return any(
        abs(ratio - Decimal(token[name])) <= Decimal("1e-4") * ratio
        for name in ("clip_low_threshold", "clip_high_threshold")
    )


@pytest.mark.parametrize("loss_fn", [name for name in LOSSES if LOSS_FNS[name].is_elementwise])
@settings(max_examples=120, deadline=None)
@given(token=tokens())
def test_whatever_a_token_brings_its_loss_is_the_formulas(loss_fn, token):
    token = as_float32(token)
    with localcontext(prec=25, Emax=10**9, Emin=-(10**9)):
        expected_loss, expected_slope = reference(loss_fn, token)
        a, lp, beta = (Decimal(token[name]) for name in ("advantages", "lp", "beta"))
        gap = lp - Decimal(token["logprobs"])
        scale = max(1, abs(a), abs(lp))
        if loss_fn in ("dro", "stable_reinforce"):  # differences: as exact as the larger of the two
            factor = beta if loss_fn == "dro" else Decimal(2 * token["kl_coeff"])
            scale += Decimal("3e33") * (abs(factor * gap * gap) + abs(lp * a) + abs(factor * gap))
        ((loss,), (slope,)) = ours(loss_fn, [token])
        assert_is(loss, expected_loss, scale)
        if not is_on_a_threshold(token, gap) and np.isfinite(loss):
            assert_is(slope, expected_slope, scale)


@settings(max_examples=120, deadline=None)
@given(datum=st.lists(tokens(), min_size=1, max_size=4))
def test_whatever_a_datum_brings_gspos_loss_is_the_formula(datum):
    shared = {k: datum[0][k] for k in ("clip_low_threshold", "clip_high_threshold", "beta")}
    datum = [as_float32({**token, **shared}) for token in datum]
    with localcontext(prec=25, Emax=10**9, Emin=-(10**9)):
        gaps = [
            Decimal(token["lp"]) - Decimal(token["logprobs"])
            for token in datum
            if token["sequence_ratio_mask"]
        ]
        mean_gap = sum(gaps, Decimal(0)) / max(len(gaps), 1)
        losses, slopes = ours("gspo", datum)
        # Large gaps that cancel leave only rounding, and so does lp's part of L.
        rounding = Decimal("1e-6") * max(map(abs, [*gaps, *(Decimal(t["lp"]) for t in datum)]))
        if rounding > Decimal("1e-5") and abs(mean_gap) < 2 * rounding + 200:
            return
        for token, loss, slope in zip(datum, losses, slopes, strict=True):
            expected_loss, expected_slope = reference("gspo", token, mean_gap)
            scale = max(1, abs(Decimal(token["advantages"])))
            if is_on_a_threshold(token, mean_gap):
                continue
            assert_is(loss, expected_loss, scale)
            if np.isfinite(loss):
                assert_is(slope, expected_slope, scale)


@pytest.mark.parametrize(
    "loss_fn", ["importance_sampling", "ppo", "cispo", "gspo", "stable_reinforce"]
)
@pytest.mark.parametrize("logprob", [-60.0, -95.0, -150.0, FILLER, -MAX_FLOAT32])
def test_a_token_without_advantage_changes_nothing_whatever_its_logprob(
    loss_fn, logprob, engine, make_datum
):
    """Neither the other tokens' loss nor the gradient, to the bit."""
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2} if loss_fn == "gspo" else {}
    datum = make_datum(6, loss_fn=loss_fn)
    inputs = datum.loss_fn_inputs
    inputs["advantages"][0] = 0.0
    if loss_fn == "gspo":  # a token of the mask is part of the ratio, with advantage or without
        inputs["sequence_ratio_mask"][:] = [0, 1, 1, 1, 1, 1]
    far = {**inputs, "logprobs": inputs["logprobs"].copy()}
    far["logprobs"][0] = logprob
    results = []
    for number, given_inputs in enumerate((inputs, far)):
        engine.create_adapter(f"{number}", LoraConfig(rank=4))
        engine.randomise(f"{number}")
        data = [Datum(model_input=datum.model_input, loss_fn_inputs=given_inputs)]
        output = engine.train_one(f"{number}", data, loss_fn, loss_fn_config=config)
        assert all(np.isfinite(value) for value in output.metrics.values())
        results.append((output.loss, engine.grad(f"{number}").tobytes()))
    assert results[0] == results[1]


def test_a_clipped_ratio_that_overflows_has_the_clipped_loss_and_no_gradient(engine, make_datum):
    datum = make_datum(1, loss_fn="ppo")
    datum.loss_fn_inputs["logprobs"][:] = FILLER
    datum.loss_fn_inputs["advantages"][:] = 1.0
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    assert engine.train_one("a", [datum], "ppo").loss == pytest.approx(-1.2)
    assert not engine.grad("a").any()


def test_a_ratio_outside_float32_is_refused_with_its_place_and_its_numbers(engine, make_datum):
    data = [make_datum(9, loss_fn="ppo"), make_datum(4, loss_fn="ppo")]
    data[1].loss_fn_inputs["logprobs"][2] = -150.0
    data[1].loss_fn_inputs["advantages"][2] = -1.0  # nothing clips a bad token's ratio above
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    with pytest.raises(NonFiniteResult) as refusal:
        engine.train_one("a", data, "ppo")
    assert str(refusal.value).startswith(
        "data[1], position 2: the loss or its gradient is outside float32: ppo of lp -"
    )
    assert "logprobs -150, advantages -1" in str(refusal.value)
    assert not engine.grad("a").any()


def test_a_loss_whose_slope_alone_overflows_is_refused(engine, make_datum):
    """A likely token's -clip * lp * A is small, its gradient -clip * A is not."""
    x = LossInputs(
        target_logprobs=torch.tensor([[-1e-8]]),
        inputs={
            name: torch.tensor([[value]])
            for name, value in {
                "logprobs": -50.0,
                "advantages": 1e38,
                "clip_low_threshold": 0.0,
                "clip_high_threshold": 100.0,
            }.items()
        },
        config={},
    )
    loss, slope = loss_and_slope("cispo", x)
    assert loss.item() == pytest.approx(1e-8 * 1e38 * 100)
    assert slope.isinf().all()
