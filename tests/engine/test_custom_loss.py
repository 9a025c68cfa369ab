"""Custom losses, traced by the official SDK, against the Python functions they were traced from."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss
from torch.nn import functional as F  # noqa: N812  # as everyone writes it

from tests.engine.reference import TinyTrainer
from training.base_model_config import BaseModelConfig
from training.base_models import base_model_of
from training.custom_loss_graph import check_graph
from training.custom_loss_ops import FUNCTIONS, METHODS
from training.engine.custom_loss import run
from training.engine.custom_loss.run import Work, run_custom_loss
from training.engine.custom_loss.table import FUNCTION_TABLE, METHOD_TABLE
from training.engine.interface import ForwardBackwardJob
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded, NonFiniteResult
from training.types import LoraConfig
from training.worker.process import build_engine

N, K = 12, 3


def policy_gradient(logprobs, advantages):
    return -(logprobs * advantages).sum(), {}


def ppo(logprobs, q, advantages):
    ratio = torch.exp(logprobs - q)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    is_clipped = ((ratio < 0.8) | (ratio > 1.2)).float()
    return loss, {"custom/clip_fraction:mean": is_clipped.mean()}


def dpo(logprobs, q, mask):
    chosen = ((logprobs - q) * mask).sum()
    rejected = ((logprobs - q) * (1 - mask)).sum()
    margin = 0.1 * (chosen - rejected)
    return -F.logsigmoid(margin), {
        "custom/margin:mean": margin.detach(),
        "custom/correct:sum": (margin > 0).float(),
    }


def bradley_terry(logprobs, mask):
    scores = torch.stack([(logprobs * mask).sum(), (logprobs * (1.0 - mask)).sum()])
    return -torch.log_softmax(scores, dim=0)[0], {}


def kl_k3(logprobs, q, mask):
    gap = q - logprobs
    kl = (gap.exp() - gap - 1) * mask
    return kl.sum() / mask.sum().clamp(min=1), {"custom/kl:mean": kl.sum() / mask.sum()}


def entropy_like(logprobs):
    p = logprobs.exp()
    return (p * logprobs).sum() + torch.special.entr(p).mean(), {}


def masked_mean(logprobs, mask):
    n = logprobs.shape[0]
    kept = torch.where(mask > 0, logprobs, torch.zeros_like(logprobs))
    return -kept.sum() / math.sqrt(n), {"custom/n:sum": mask.sum()}


def selected(logprobs, mask):
    return -logprobs[mask > 0].mean() + logprobs[1:].sum() - logprobs[..., None].squeeze(-1)[0], {}


def contracted(logprobs, advantages):
    return -torch.einsum("i,i->", logprobs, advantages) + (logprobs @ advantages) ** 2, {}


def pairwise(logprobs, advantages):
    gaps = logprobs.unsqueeze(0) - logprobs.unsqueeze(1)
    better = (advantages.unsqueeze(0) > advantages.unsqueeze(1)).to(torch.float32)
    return (F.softplus(-gaps) * better).sum() / torch.clamp(better.sum(), min=1.0), {}


def discounted(logprobs, advantages):
    n = logprobs.size(0)
    position = torch.arange(n, device=logprobs.device, dtype=logprobs.dtype)
    returns = torch.cumsum(advantages.flip(0), dim=0).flip(0) * 0.9**position
    normal = (returns - returns.mean()) / (returns.std() + 1e-6)
    return -(logprobs * normal.detach()).sum(), {"custom/return:mean": returns[0]}


def library_losses(logprobs, q, advantages):
    loss = F.mse_loss(logprobs, q, reduction="sum") + F.huber_loss(logprobs, q)
    loss = loss + F.kl_div(logprobs, q.exp(), reduction="batchmean") + F.relu(logprobs - q).sum()
    loss = loss + F.binary_cross_entropy_with_logits(logprobs, torch.sigmoid(advantages))
    return loss + F.gelu(logprobs).sum() + logprobs.max(dim=0).values + logprobs.norm(), {}


def many_targets(logprobs, weights):
    p = logprobs.softmax(dim=-1)
    k = logprobs.shape[-1]
    masked = logprobs.masked_fill(weights <= 0, -1e4)
    loss = -(weights * torch.logsumexp(masked, dim=-1, keepdim=True)).sum() + (p / k).amax(1).sum()
    return loss, {"custom/p.max:mean": p.max()}


def scaled(logprobs, scale):
    return -(scale * logprobs).sum(), {"custom/scale:sum": scale}


LOSSES = [
    policy_gradient,
    ppo,
    dpo,
    bradley_terry,
    kl_k3,
    entropy_like,
    masked_mean,
    selected,
    contracted,
    pairwise,
    discounted,
    library_losses,
    many_targets,
    scaled,
]


def draw(name, *, many=False):
    rng = np.random.default_rng(sum(map(ord, name)))
    shape = () if name == "scale" else (N, K) if many else (N,)
    if name == "mask":
        return torch.tensor((rng.random(shape) < 0.6).astype(np.float32))
    shift = -2.0 if name in ("logprobs", "q") else 0.0
    return torch.tensor(rng.normal(size=shape) + shift, dtype=torch.float32)


def traced(function, **ranks):
    """The loss's graph as it arrives at the server, checked."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    handle = trace_loss(function, {name: ranks.get(name, 1) for name in names}, "session")
    body = json.loads(json.dumps(encode_graph(handle).model_dump()))
    return check_graph(handle.name, [item.model_dump() for item in handle.inputs], body)


def graph_of(function, *names):
    many = function is many_targets
    return traced(function, **{name: draw(name, many=many).ndim for name in names})


@pytest.mark.parametrize("function", LOSSES, ids=lambda function: function.__name__)
def test_a_traced_loss_computes_what_its_function_computes(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = {name: draw(name, many=function is many_targets) for name in names}
    output = run_custom_loss(
        graph_of(function, *names),
        values["logprobs"],
        {name: values[name] for name in names[1:]},
        Work(),
    )
    leaf = values["logprobs"].clone().requires_grad_()
    loss, metrics = function(*(values | {"logprobs": leaf}).values())
    (grad,) = torch.autograd.grad(loss, leaf)
    assert output.loss == loss.detach().item()
    torch.testing.assert_close(output.grad, grad, rtol=0, atol=0)
    assert output.metrics == {name: value.detach().item() for name, value in metrics.items()}


def test_everything_on_the_list_has_a_callable_and_nothing_else_has():
    assert set(FUNCTION_TABLE) == set(FUNCTIONS)
    assert set(METHOD_TABLE) == set(METHODS)


def too_large(logprobs):
    grown = logprobs.unsqueeze(0).expand(10**9, 12)
    return logprobs.sum() + grown.sum(), {}


def too_large_to_make(logprobs):
    return logprobs.sum() + torch.zeros(logprobs.shape[0] * 10**11).sum(), {}


def too_large_inside(logprobs, many):
    return logprobs.sum() + F.mse_loss(many.unsqueeze(0), many.unsqueeze(1)), {}


def too_much_work(logprobs, many):
    square = many.unsqueeze(0) * many.unsqueeze(1)
    return logprobs.sum() + (square @ square @ square @ square).sum(), {}


def number_without_end(logprobs):
    n = logprobs.shape[0] + 10**9
    return logprobs.sum() * (n * n * n), {}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (too_large, LimitExceeded, "node expand (expand): 12000000000 elements"),
        (too_large_to_make, LimitExceeded, "node zeros (torch.zeros): 1200000000000 elements"),
        (too_large_inside, LimitExceeded, "node mse_loss (torch.nn.functional.mse_loss): 25000000"),
        (too_much_work, LimitExceeded, "node matmul_2 (operator.matmul): 8000 multip"),
        (number_without_end, InvalidRequest, "node mul_1 (operator.mul): the result is no number"),
    ],
)
def test_what_would_grow_too_large_is_refused_before_it_runs(function, error, message, monkeypatch):
    size = 5000
    if function is too_much_work:
        size = 20
        monkeypatch.setattr(run, "MAX_MULTIPLICATIONS", 3 * size**3 - 1)
    with pytest.raises(error) as refusal:
        run_custom_loss(traced(function), draw("logprobs"), {"many": torch.ones(size)}, Work())
    assert str(refusal.value).startswith(f"custom loss {function.__name__!r}, {message}")


def test_the_datums_of_a_request_share_its_limit(trained, make_datum, monkeypatch):
    graph = traced(weighted)
    data = [make_datum(5), make_datum(7), make_datum(7)]
    monkeypatch.setattr(run, "MAX_STEPS", 40_000)
    engine = trained()
    first, failed = engine.forward_backward([custom_job(graph, data[:2]), custom_job(graph, data)])
    assert first.loss
    assert isinstance(failed, LimitExceeded)
    assert "steps to compute; a request may have 40000 in all, and " in str(failed)


def no_scalar(logprobs):
    return logprobs * 2, {}


def no_gradient(logprobs, advantages):
    return advantages.sum(), {}


def not_finite(logprobs):
    return (logprobs - 1e9).exp().log().sum(), {}


def infinite_slope(logprobs):
    return (logprobs - logprobs).sqrt().sum(), {}


def metric_not_finite(logprobs):
    return logprobs.sum(), {"custom/x:mean": (logprobs / 0).sum()}


def metric_no_scalar(logprobs):
    return logprobs.sum(), {"custom/x:mean": logprobs * 1}


def shapes_that_do_not_fit(logprobs):
    return (logprobs + logprobs[1:]).sum(), {}


def bad_setting(logprobs):
    return F.huber_loss(logprobs, logprobs, delta=-1.0), {}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (no_scalar, InvalidRequest, "the loss is a tensor of shape [12] and dtype float32"),
        (no_gradient, InvalidRequest, "the loss does not depend on logprobs"),
        (not_finite, NonFiniteResult, "the loss is -inf"),
        (infinite_slope, NonFiniteResult, "the gradient of the loss in logprobs is not finite"),
        (metric_not_finite, NonFiniteResult, "metric custom/x:mean is -inf"),
        (metric_no_scalar, InvalidRequest, "metric custom/x:mean is a tensor of shape [12]"),
        (bad_setting, InvalidRequest, "node huber_loss (torch.nn.functional.huber_loss): "),
        (shapes_that_do_not_fit, InvalidRequest, "node add (operator.add): "),
    ],
)
def test_a_loss_that_goes_wrong_says_where(function, error, message):
    with pytest.raises(error) as refusal:
        run_custom_loss(
            traced(function), draw("logprobs"), {"advantages": draw("advantages")}, Work()
        )
    assert str(refusal.value).startswith(f"custom loss {function.__name__!r}")
    assert message in str(refusal.value)


def weighted(logprobs, weights):
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss, "custom/weight:mean": weights.sum()}


def custom_job(graph, data, **kwargs):
    return ForwardBackwardJob(
        adapter_name="a", data=data, loss_fn="custom", custom_loss=graph, **kwargs
    )


@pytest.fixture
def trained(make_engine):
    """A factory of engines with the same adapter."""

    def make():
        engine = make_engine()
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
        return engine

    return make


@pytest.mark.parametrize("num_targets", [0, 3])
def test_cross_entropy_as_a_custom_loss_is_cross_entropy(num_targets, trained, make_datum):
    ours, theirs = trained(), trained()
    data = [make_datum(n, seed=n, num_targets=num_targets) for n in (9, 4, 9)]
    rank = 2 if num_targets else 1
    graph = traced(weighted, logprobs=rank, weights=rank)

    output = ours.train_one("a", data, "custom", custom_loss=graph)
    expected = theirs.train_one("a", data)

    assert output.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(ours.grad("a"), theirs.grad("a"), rtol=1e-5, atol=1e-7)
    for logprobs, reference in zip(output.logprobs, expected.logprobs, strict=True):
        np.testing.assert_array_equal(logprobs, reference)
    weight = sum(datum.loss_fn_inputs["weights"].sum() for datum in data)
    assert output.metrics == {
        "loss:sum": output.loss,
        "custom/nll:sum": pytest.approx(output.loss, rel=1e-5),
        "custom/weight:mean": pytest.approx(weight / 3, rel=1e-5),
    }


def out_of_range(logprobs, index):
    return logprobs[index].sum(), {}


def test_a_custom_loss_that_fails_leaves_its_batch_mates_alone(trained, make_datum):
    together, alone = trained(), trained()
    good = ForwardBackwardJob(adapter_name="a", data=[make_datum(5)], loss_fn="cross_entropy")
    bad = make_datum(6)
    bad.loss_fn_inputs["index"] = np.array([0, 99])
    jobs = [good, custom_job(traced(out_of_range), [bad]), good]

    first, failed, second = together.forward_backward(jobs)
    expected = alone.forward_backward([good, good])

    assert type(failed) is InvalidRequest
    assert str(failed).startswith(
        "data[0]: custom loss 'out_of_range', node getitem (operator.getitem): index 99"
    )
    assert [first.loss, second.loss] == [output.loss for output in expected]
    np.testing.assert_array_equal(together.grad("a"), alone.grad("a"))


def test_a_custom_loss_can_be_evaluated_without_a_gradient(trained, make_datum):
    engine = trained()
    (output,) = engine.forward_backward(
        [custom_job(traced(weighted), [make_datum(5)], forward_only=True)]
    )
    assert output.metrics["custom/nll:sum"] == pytest.approx(output.loss)
    assert not engine.grad("a").any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "data[0].loss_fn_inputs.weights: missing"),
        ({"weights": np.ones((5, 2))}, "data[0].loss_fn_inputs.weights: 2 dimensions instead of 1"),
        ({"target_tokens": np.zeros((5, 2), int)}, "data[0].loss_fn_inputs.target_tokens: 2 dim"),
        ({"weights": np.array([1, np.inf])}, "data[0].loss_fn_inputs.weights[1]: inf is not fini"),
    ],
)
def test_a_datum_without_what_a_custom_loss_reads_is_refused(change, message, trained, make_datum):
    datum = make_datum(5)
    for name, value in change.items():
        datum.loss_fn_inputs.pop(name)
        if value is not None:
            datum.loss_fn_inputs[name] = value
    (error,) = trained().forward_backward([custom_job(traced(weighted), [datum])])
    assert isinstance(error, InvalidDatum)
    assert str(error).startswith(message)


def test_more_steps_than_one_request_may_take_are_refused(trained, make_datum, monkeypatch):
    monkeypatch.setattr("training.engine.validate.MAX_OPERATIONS", 20)
    (error,) = trained().forward_backward([custom_job(traced(weighted), [make_datum(2)] * 4)])
    assert isinstance(error, LimitExceeded)
    assert str(error).startswith("data: 4 datums for a custom loss of ")


def long(logprobs):
    """On hundreds of datums seconds of processor time, on any machine."""
    values = logprobs
    for _ in range(300):
        values = values.exp()
    return values.sum(), {}


def test_a_custom_loss_that_is_ended_leaves_its_batch_mates_alone(
    tied_base_model, make_datum, custom_loss_process, monkeypatch
):
    """With the runner of a worker: the others' bits, the gradient's too, are those without it."""
    monkeypatch.setattr("training.engine.validate.MAX_OPERATIONS", 10**9)
    monkeypatch.setattr(custom_loss_process, "_cpu_seconds", 0.1)
    engines = [
        TinyTrainer(tied_base_model, token_budget=4096, custom_losses=custom_loss_process)
        for _ in range(2)
    ]
    for engine in engines:
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
    together, alone = engines
    plain = ForwardBackwardJob(adapter_name="a", data=[make_datum(5)], loss_fn="cross_entropy")
    custom = custom_job(traced(weighted), [make_datum(7)])
    bad = custom_job(traced(long), [make_datum(6)] * 500)

    first, failed, second = together.forward_backward([plain, bad, custom])
    expected = alone.forward_backward([plain, custom])

    assert type(failed) is LimitExceeded
    assert str(failed).startswith("data[0]: custom loss 'long': it took more than the 0.1 s")
    assert [first.loss, second.loss] == [output.loss for output in expected]
    assert second.metrics == expected[1].metrics
    np.testing.assert_array_equal(together.grad("a"), alone.grad("a"))


def test_a_worker_computes_custom_losses_in_another_process(tied_folder, monkeypatch):
    made = []
    monkeypatch.setattr(
        "training.engine.custom_loss.process.CustomLossProcess",
        lambda: made.append(object()) or made[0],
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    config = BaseModelConfig(name="tiny", path=str(tied_folder), device="cpu", dtype="float32")
    engine = build_engine(base_model_of(config, tied_folder.parent))
    assert engine.trainer._custom_losses is made[0]
