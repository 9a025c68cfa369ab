"""Refusals: each names the datum, the field and the position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.engine.interface import ForwardBackwardJob
from training.engine.validate import check_adam_params, check_job, check_lora_config
from training.errors import InvalidRequest
from training.loss_fns import LOSS_FNS, TOLERATED_INPUTS
from training.types import AdamParams, Datum, LoraConfig


def changed(datum, **inputs):
    """The datum with other loss inputs; None takes one away."""
    merged = {**datum.loss_fn_inputs, **inputs}
    return Datum(
        model_input=datum.model_input,
        loss_fn_inputs={name: value for name, value in merged.items() if value is not None},
    )


def job_of(*data, loss_fn="cross_entropy", **kwargs):
    return ForwardBackwardJob(adapter_name="a", data=data, loss_fn=loss_fn, **kwargs)


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_a_setting_per_token_that_is_no_threshold_is_accepted(make_datum, tiny_info, monkeypatch):
    per_token = replace(LOSS_FNS["dro"], optional_inputs=("beta",))
    monkeypatch.setattr("training.loss_fns.LOSS_FNS", {**LOSS_FNS, "dro": per_token})
    datum = changed(make_datum(3, loss_fn="dro"), beta=np.full(3, 0.5, np.float32))

    config = check_job(job_of(datum, loss_fn="dro", loss_fn_config={"beta": 1.0}), tiny_info)

    assert config == {"beta": 1.0}


def test_an_optional_input_without_a_meaning_is_no_loss():
    with pytest.raises(ValueError, match="scale: an optional input must be a setting too"):
        replace(LOSS_FNS["dro"], optional_inputs=("scale",))


def test_a_good_job_gets_its_losss_defaults(make_datum, tiny_info):
    job = job_of(
        make_datum(3, loss_fn="ppo"), loss_fn="ppo", loss_fn_config={"clip_high_threshold": 2}
    )
    config = check_job(job, tiny_info)
    assert config == {"clip_low_threshold": 0.8, "clip_high_threshold": 2.0}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"weights": np.ones(4)}, "weights: 4 values for 5 tokens"),
        ({"weights": np.ones((5, 2))}, "weights: shape [5, 2] for targets of shape [5]"),
        ({"weights": np.array([0, 1, np.nan, 1, 1])}, "weights[2]: nan is not finite in float32"),
        ({"weights": np.array([0, 1, 1, 1e39, 1])}, "weights[3]: 1e+39 is not finite in float32"),
        ({"weights": np.array(["x"] * 5)}, "weights: <U1 values instead of numbers"),
        ({"target_tokens": None}, "target_tokens: missing, and cross_entropy needs it"),
        ({"target_tokens": np.zeros(6, int)}, "target_tokens: 6 values for 5 tokens"),
        (
            {"target_tokens": np.array([1, 2, 3, 259, 5])},
            "target_tokens[3]: token 259 is not in the vocabulary of 259",
        ),
        (
            {"target_tokens": np.array([[1, 2], [-1, 3], [0, 0], [0, 0], [0, 0]])},
            "target_tokens[1][0]: token -1 is not in the vocabulary of 259",
        ),
        ({"target_tokens": np.zeros(5)}, "target_tokens: float64 values instead of token ids"),
        ({"target_tokens": np.zeros((5, 0), int)}, "target_tokens: no targets"),
        (
            {"target_tokens": np.zeros((5, 1, 1), int)},
            "target_tokens: 3 dimensions instead of 1 or 2; got shape [5, 1, 1] for 5 tokens",
        ),
        (
            {"target_tokens": np.zeros((3, 5), int)},
            "target_tokens: shape [3, 5] for 5 tokens; expected [5, 5]",
        ),
        ({"novelty": np.ones(5)}, "novelty: not an input of cross_entropy; it takes target_tok"),
        (
            {"weights": None, "advantages": np.ones(5)},
            "weights: missing, beside advantages that cross_entropy does not read",
        ),
        (
            {"weights": np.array([0, 1, 1, 1, 1]), "mask": np.array([0, 1, 1, 0, 1])},
            "mask[3]: 0, and cross_entropy does not read it; only 1 is taken where weights are not",
        ),
        ({"mask": np.ones((5, 2))}, "mask: shape [5, 2] for weights of shape [5]"),
    ],
)
def test_a_wrong_loss_input_is_refused_by_name(inputs, message, make_datum, tiny_info):
    job = job_of(make_datum(5), changed(make_datum(5), **inputs))
    with pytest.raises(InvalidRequest) as refusal:
        check_job(job, tiny_info)
    assert str(refusal.value).startswith(f"data[1].loss_fn_inputs.{message}")


@pytest.mark.parametrize(
    ("model_input", "message"),
    [
        (np.array([], np.int32), "data[0].model_input: empty"),
        (np.zeros((2, 2), np.int32), "data[0].model_input: 2 dimensions instead of 1"),
        (np.array([3, 300]), "data[0].model_input[1]: token 300 is not in the vocabulary of 259"),
        (np.zeros(513, int), "data[0].model_input: 513 tokens, and the model reads at most 512"),
        (np.array([1.5]), "data[0].model_input: float64 values instead of token ids"),
    ],
)
def test_a_wrong_model_input_is_refused_by_name(model_input, message, make_datum, tiny_info):
    datum = Datum(model_input=model_input, loss_fn_inputs=make_datum(5).loss_fn_inputs)
    with pytest.raises(InvalidRequest) as refusal:
        check_job(job_of(datum), tiny_info)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("mse", {}, "loss_fn: expected one of cross_entropy, "),
        (
            "stable_reinforce",
            {"kl_coeff": -0.1},
            "loss_fn_config.kl_coeff: -0.1 is not at least 0",
        ),
        ("custom", {}, "loss_fn: custom: it needs a loss that was uploaded"),
        ("gspo", {"clip_low_threshold": 0.9}, "loss_fn_config.clip_high_threshold: this field is"),
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config.beta: unknown for cross_entropy"),
        ("ppo", {"clip": 0.2}, "loss_fn_config.clip: unknown for ppo; expected clip_low"),
        ("dro", {}, "loss_fn_config.beta: this field is required for dro"),
        ("dro", {"beta": float("nan")}, "loss_fn_config.beta: nan is not finite"),
        ("dro", {"beta": 1e300}, "loss_fn_config.beta: 1e+300 is not a number that a float32 can"),
        ("ppo", {"clip_low_threshold": 1.5}, "loss_fn_config.clip_low_threshold: 1.5 is above"),
    ],
)
def test_a_wrong_loss_or_config_is_refused_by_name(loss_fn, config, message, make_datum, tiny_info):
    datum = make_datum(5, loss_fn=loss_fn if loss_fn in LOSS_FNS else "cross_entropy")
    job = job_of(datum, loss_fn=loss_fn, loss_fn_config=config)
    with pytest.raises(InvalidRequest) as refusal:
        check_job(job, tiny_info)
    assert str(refusal.value).startswith(message)


def test_no_data_is_refused(tiny_info):
    with pytest.raises(InvalidRequest, match="data: empty"):
        check_job(job_of(), tiny_info)


def test_a_policy_loss_takes_one_target_per_token(make_datum, tiny_info):
    job = job_of(make_datum(5, loss_fn="ppo", num_targets=2), loss_fn="ppo")
    with pytest.raises(InvalidRequest) as refusal:
        check_job(job, tiny_info)
    assert str(refusal.value) == (
        "data[0].loss_fn_inputs.target_tokens: shape [5, 2], and ppo takes one target per token, "
        "shape [5]; several per token are for cross_entropy"
    )


def test_a_low_threshold_of_a_token_above_its_high_one_is_refused(make_datum, tiny_info):
    datum = changed(make_datum(3, loss_fn="ppo"), clip_low_threshold=np.array([0.8, 1.3, 0.8]))
    with pytest.raises(InvalidRequest) as refusal:
        check_job(job_of(datum, loss_fn="ppo"), tiny_info)
    assert str(refusal.value) == (
        "data[0].loss_fn_inputs.clip_low_threshold[1]: above clip_high_threshold"
    )


@pytest.mark.parametrize("forward_only", [False, True])
def test_cross_entropy_needs_no_weights(forward_only, make_datum, tiny_info):
    datum = changed(make_datum(5), weights=None)
    assert check_job(job_of(datum, forward_only=forward_only), tiny_info) == {}


def test_evaluating_the_datum_of_another_loss_needs_no_weights(make_datum, tiny_info):
    datum = make_datum(5, loss_fn="gspo")
    assert check_job(job_of(datum, forward_only=True), tiny_info) == {}


@pytest.mark.parametrize("loss_fn", LOSS_FNS)
@pytest.mark.parametrize("name", sorted(TOLERATED_INPUTS))
def test_a_known_input_that_a_loss_does_not_read_is_taken(loss_fn, name, make_datum, tiny_info):
    if LOSS_FNS[loss_fn].takes(name):
        return
    config = {key: setting.default or 0.5 for key, setting in LOSS_FNS[loss_fn].config.items()}
    datum = changed(make_datum(5, loss_fn=loss_fn), **{name: np.ones(5, np.float32)})
    assert check_job(job_of(datum, loss_fn=loss_fn, loss_fn_config=config), tiny_info) == config


@pytest.mark.parametrize("name", ["weights", "mask"])
def test_weights_beside_advantages_are_taken_only_if_reading_them_would_change_nothing(
    name, make_datum, tiny_info
):
    advantages = np.array([0, 0, 2, -1], np.float32)
    datum = changed(make_datum(4, loss_fn="ppo"), advantages=advantages)
    for given in ([0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [5, 0, 1, 1]):
        check_job(job_of(changed(datum, **{name: np.array(given)}), loss_fn="ppo"), tiny_info)
    for given, place in (([0, 0, 0, 1], "[2]: 0"), ([0, 0, 1, 0.5], "[3]: 0.5")):
        with pytest.raises(InvalidRequest) as refusal:
            check_job(job_of(changed(datum, **{name: np.array(given)}), loss_fn="ppo"), tiny_info)
        assert str(refusal.value).startswith(
            f"data[0].loss_fn_inputs.{name}{place}, and ppo does not read it"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1.0}, "adam_params.learning_rate"),
        ({"learning_rate": float("nan")}, "adam_params.learning_rate"),
        (
            {"learning_rate": 1e300},
            "adam_params.learning_rate: 1e.300 is not a number that a",
        ),
        ({"weight_decay": 1e40}, "adam_params.weight_decay: 1e.40 is not a number that a float32"),
        ({"beta1": 1.0}, "adam_params.beta1"),
        ({"beta2": -0.1}, "adam_params.beta2"),
        ({"eps": float("inf")}, "adam_params.eps"),
        ({"weight_decay": -0.1}, "adam_params.weight_decay"),
        ({"grad_clip_norm": -1.0}, "adam_params.grad_clip_norm"),
    ],
)
def test_a_wrong_optimizer_parameter_is_refused_by_name(change, message):
    with pytest.raises(InvalidRequest, match=message):
        check_adam_params(replace(AdamParams(), **change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=0), "rank: 0"),
        (LoraConfig(alpha=float("inf")), "alpha: inf"),
        (LoraConfig(alpha=1e308), "alpha: 1e.308 is not a number that a float32 can hold"),
        (LoraConfig(train_attn=False, train_mlp=False, train_unembed=False), "at least one"),
    ],
)
def test_a_wrong_adapter_shape_is_refused_by_name(config, message):
    with pytest.raises(InvalidRequest, match=message):
        check_lora_config(config)
