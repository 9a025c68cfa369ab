"""The fake engine obeys the contract where its arithmetic allows, and reveals mistakes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.engine.test_trainer import job
from training.engine.fake.engine import fake_engine
from training.engine.fake.sampler import END_TOKEN
from training.engine.fake.trainer import FakeTrainer
from training.engine.interface import SampleJob
from training.types import AdamParams, Datum, LoraConfig, SamplingParams

STEP = AdamParams(learning_rate=0.1)


@pytest.fixture
def fake():
    trainer = FakeTrainer()
    trainer.create_adapter("a", LoraConfig())
    trainer.create_adapter("b", LoraConfig(seed=1))
    return trainer


@pytest.fixture
def sampler(fake):
    return fake_engine(trainer=fake).sampler


@pytest.fixture
def make_fake_datum(make_datum):
    """Random datums within the fake's smaller vocabulary."""

    def make(num_tokens, seed=0, **kwargs):
        datum = make_datum(num_tokens, seed, **kwargs)
        inputs = {
            name: values % 257 if name == "target_tokens" else values
            for name, values in datum.loss_fn_inputs.items()
        }
        return Datum(model_input=datum.model_input % 257, loss_fn_inputs=inputs)

    return make


def sample_all(sampler, key, sample_job):
    sampler.submit(key, sample_job)
    results = {}
    while sampler.active:
        results |= sampler.poll(0)
    return results[key]


def test_it_needs_no_torch():
    code = "import sys, training.engine.fake.trainer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_lowers_the_loss(fake, make_fake_datum):
    losses = []
    datum = make_fake_datum(40)
    datum.loss_fn_inputs["weights"][:] = 1
    for _ in range(5):
        (output,) = fake.forward_backward([job("a", datum)])
        losses.append(output.loss)
        fake.optim_step("a", STEP)
    assert losses == sorted(losses, reverse=True)
    assert output.loss == pytest.approx(-output.logprobs[0].sum(), rel=1e-5)


def test_merging_requests_changes_no_bit(fake, make_fake_datum):
    jobs = [job("a", make_fake_datum(n)) for n in (3, 9, 27)]
    fake.forward_backward(jobs)
    other = FakeTrainer()
    other.create_adapter("a", LoraConfig())
    for one in reversed(jobs):
        other.forward_backward([one])
    np.testing.assert_array_equal(fake.adapter_state("a")["grad"], other.adapter_state("a")["grad"])


def test_the_order_of_steps_shows(make_fake_datum):
    states = []
    for order in ((0, 1), (1, 0)):
        trainer = FakeTrainer()
        trainer.create_adapter("a", LoraConfig())
        for seed in order:
            trainer.forward_backward([job("a", make_fake_datum(9, seed))])
            trainer.optim_step("a", STEP)
        states.append(trainer.adapter_state("a")["weights"])
    assert not np.array_equal(*states)


def test_sampling_stops_where_it_is_told(sampler):
    def ask(stop):
        params = SamplingParams(max_tokens=200, seed=0, stop=stop)
        job_ = SampleJob(prompt=np.array(list(b"hi"), np.int32), sampling_params=params)
        return sample_all(sampler, str(stop), job_).sequences[0]

    free = ask(())
    assert len(free.tokens) == 200
    assert free.stop_reason == "length"
    mark = free.text[10:12]
    stopped = ask((mark,))
    assert stopped.stop_reason == "stop"
    assert stopped.text == free.text.partition(mark)[0]
    token = free.tokens[5]
    assert ask((token,)).tokens == free.tokens[: free.tokens.index(token) + 1]


def test_the_fake_knows_the_ends_that_the_real_one_knows(sampler):
    def ask(**params):
        given = SamplingParams(**{"max_tokens": 200, "seed": 0, **params})
        one = SampleJob(prompt=np.array(list(b"hi"), np.int32), sampling_params=given)
        return sample_all(sampler, str(params), one).sequences[0]

    free = ask(stop=())
    assert ask(ignore_eos=True).tokens == free.tokens
    mark = free.tokens[5]
    stopped = ask(stop_token_ids=(mark,), ignore_eos=True)
    assert stopped.tokens == free.tokens[: free.tokens.index(mark) + 1]
    said = bytes(token for token in stopped.tokens[:-1] if token != END_TOKEN).decode()
    assert (stopped.text, stopped.stop_reason) == (said, "stop")
    assert (ask(max_tokens=0).tokens, ask(max_tokens=0).stop_reason) == ([], "length")


def test_a_hook_sees_every_verb_before_it_happens(make_fake_datum):
    seen = []
    trainer = FakeTrainer(before_verb=lambda verb, names: seen.append((verb, names)))
    trainer.create_adapter("a", LoraConfig())
    trainer.forward_backward([job("a", make_fake_datum(3))])
    trainer.optim_step("a", STEP)
    assert seen == [
        ("create_adapter", ("a",)),
        ("forward_backward", ("a",)),
        ("optim_step", ("a",)),
    ]
