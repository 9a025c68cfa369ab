"""Models whose rotary factors depend on a sequence's length: each sequence has its own factors.

The factors are others from 33 tokens on, and the tests' models tell them apart by nats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.families import save_random, small_config
from tests.engine.reference import PeftReference, TinyTrainer
from tests.engine.test_model_families import LONGROPE
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.types import Datum, LoraConfig, SamplingParams

SWITCH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config("phi3", **LONGROPE, original_max_position_embeddings=SWITCH)
    return Path(save_random(config, tmp_path_factory.mktemp("longrope")))


@pytest.fixture(scope="module")
def base_model(folder: Path) -> BaseModel:
    return load_base_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def trainer(base_model: BaseModel) -> TinyTrainer:
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=8, alpha=8.0))
    trainer.randomise("a")
    return trainer


def make_data(*lengths: int) -> list[Datum]:
    """Datums with a shared prefix."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB_SIZE, max(lengths) + 1)
    return [
        Datum(
            model_input=tokens[:n].astype(np.int32),
            loss_fn_inputs={
                "target_tokens": tokens[1 : n + 1],
                "weights": rng.normal(size=n).astype(np.float32),
            },
        )
        for n in lengths
    ]


def test_the_context_goes_beyond_the_switch(base_model: BaseModel) -> None:
    assert base_model.rotary_switch == base_model.info.rotary_switch == SWITCH
    assert base_model.info.max_context_tokens == 64


def test_datums_beside_each_other_are_what_stock_peft_makes_of_each(
    folder: Path, trainer: TinyTrainer
) -> None:
    """Datums within the switch share their prefix, and so do those beyond it."""
    data = make_data(20, SWITCH, SWITCH + 1, 48, 30, 64)
    stock = PeftReference(folder, trainer, "a")
    result = trainer.train_one("a", data)
    for datum, ours in zip(data, result.logprobs, strict=True):
        theirs = stock.logprobs(datum)[:, 0]
        (-(theirs * torch.from_numpy(datum.loss_fn_inputs["weights"])).sum()).backward()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)
    difference = np.linalg.norm(trainer.grad("a") - stock.grad())
    assert difference < 1e-4 * np.linalg.norm(stock.grad())


def test_a_short_datums_bits_are_those_it_has_alone(trainer: TinyTrainer) -> None:
    short, long = make_data(20, 48)
    (alone,) = trainer.train_one("a", [short]).logprobs
    beside, _ = trainer.train_one("a", [short, long]).logprobs
    assert np.array_equal(alone, beside)
    assert np.abs(trainer.train_one("a", [long]).logprobs[0][:20] - alone).max() > 0.1


def sample(base_model: BaseModel, *jobs: SampleJob, chunk: int = 256) -> list[SampleOutput]:
    renderer = ChatRenderer(base_model.tokenizer, VOCAB_SIZE)
    sampler = ContinuousSampler(base_model, renderer, cache_tokens=4096, prefill_chunk_tokens=chunk)
    done = {}
    for i, job in enumerate(jobs):
        sampler.submit(str(i), job)
    while sampler.active:
        done |= sampler.poll(0.0)
    return [done[str(i)] for i in range(len(jobs))]


def make_job(length: int, *, temperature: float = 1.0, num_samples: int = 1) -> SampleJob:
    prompt = np.random.default_rng(length).integers(3, VOCAB_SIZE, length).astype(np.int32)
    return SampleJob(
        prompt=prompt,
        version=None,
        num_samples=num_samples,
        prompt_logprobs=True,
        sampling_params=SamplingParams(
            max_tokens=64 - length, seed=length, stop=(), temperature=temperature
        ),
    )


JOBS = [make_job(n, num_samples=2) for n in (3, SWITCH - 1, SWITCH, SWITCH + 1, 50)]


@pytest.mark.parametrize("chunk", [256, 7])
def test_a_sampled_token_has_the_logprob_of_a_pass_over_what_came_before(
    folder: Path, base_model: BaseModel, chunk: int
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for job, output in zip(JOBS, sample(base_model, *JOBS, chunk=chunk), strict=True):
        for sequence in output.sequences:
            tokens = [*job.prompt, *sequence.tokens]
            for n, logprob in enumerate(sequence.logprobs):
                end = len(job.prompt) + n
                with torch.no_grad():
                    logits = stock(torch.tensor([tokens[:end]])).logits[0, -1]
                assert abs(logits.log_softmax(-1)[tokens[end]].item() - logprob) < 1e-4, end


def test_the_likeliest_tokens_are_those_that_transformers_generates(
    folder: Path, base_model: BaseModel
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for length in (3, SWITCH, 40):
        job = make_job(length, temperature=0.0)
        (output,) = sample(base_model, job)
        with torch.no_grad():
            generated = stock.generate(
                torch.tensor([job.prompt.tolist()]),
                max_new_tokens=64 - length,
                do_sample=False,
                eos_token_id=None,
            )
        assert output.sequences[0].tokens == generated[0, length:].tolist()


def test_what_shares_the_steps_changes_no_sample(base_model: BaseModel) -> None:
    together = sample(base_model, *JOBS)
    for job, output in zip(JOBS, together, strict=True):
        (alone,) = sample(base_model, job)
        assert alone.sequences == output.sequences
        assert np.array_equal(alone.prompt_logprobs, output.prompt_logprobs, equal_nan=True)


def test_a_prompt_is_read_between_the_sequences_of_a_job_that_are_read_again(
    base_model: BaseModel,
) -> None:
    renderer = ChatRenderer(base_model.tokenizer, VOCAB_SIZE)
    sampler = ContinuousSampler(base_model, renderer, cache_tokens=8192, prefill_chunk_tokens=16)
    sampler.submit("many", make_job(SWITCH, num_samples=64))
    while not sampler._active["many"].rereads:
        sampler.poll(0.0)
    scoring = replace(make_job(8), sampling_params=SamplingParams(max_tokens=0, seed=0, stop=()))
    sampler.submit("short", scoring)
    done = {}
    while "short" not in done:
        done |= sampler.poll(0.0)
    assert len(sampler._active["many"].rereads) > 60
