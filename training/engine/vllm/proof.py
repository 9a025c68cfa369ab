"""The check of a server: does it compute what the built-in sampler computes?

A server with other weights, another dtype or another definition of a log-probability would answer
without an error. So the built-in sampler computes some log-probabilities once, and each server is
asked for the same before it gets a job: of the base model, of a tempered distribution, and of two
random adapters, one on the output head and one on all other layers. It must also refuse a name that
it does not know, because a request for a version that it has lost would otherwise be answered with
the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.engine.interface import SampleJob, SampleOutput, Sampler
from training.engine.probe.comparison import tolerance
from training.engine.torch.adapters import AdapterLayout, AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.torch.checkpoint_io import CapturedTensors
from training.engine.vllm.adapter_files import write_adapter
from training.engine.vllm.answers import check_model, only_choice, read_choices, read_scores
from training.engine.vllm.client import ServedModel, ServerRefuses, VllmClient, WrongAnswer
from training.engine.vllm.folders import VersionFolders
from training.engine.vllm.requests import request_body
from training.errors import NonFiniteResult, TrainingError
from training.types import LoraConfig, SamplingParams, ScoringParams

HEAD, LAYERS, EXPERTS = "the output head", "layers", "experts"
"""The parts of adapters: each is proven separately. Experts are left to the built-in sampler."""

PROMPT_TOKENS = 24
NUM_TOP = 5
TEMPERATURE = 0.5
RANK = 8
FIRST_SPREAD = 0.02
"""Standard deviation of the random matrices, doubled until the adapter has a visible effect."""
LARGEST_SPREAD = 2.0
VISIBLE = 4.0
"""How much larger than the tolerance an adapter's effect must be: a check that an adapter without
an effect would pass proves nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckedAdapter:
    """A random adapter on a part of the model, and its log-probabilities."""

    weights: AdapterTensors
    logprobs: NDArray[np.float32]
    """(T,) of the prompt's tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """The built-in sampler's answers."""

    job: SampleJob
    """Asks for the prompt's log-probabilities and one tempered token."""
    logprobs: NDArray[np.float32]
    """(T,) of the base model."""
    tempered: Mapping[int, float]
    """The likeliest tokens after the prompt."""
    adapters: Mapping[str, CheckedAdapter]
    """By part."""
    largest_difference: float
    """In nats: what rounding explains."""
    is_exact: bool
    """Whether every number is compared (float32), or their mean."""
    base_model_name: str

    def difference(
        self, ours: NDArray[np.float32] | Sequence[float], theirs: NDArray[np.float32] | list[float]
    ) -> float:
        """How far two lists of log-probabilities are apart; NaN if one has NaN."""
        difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
        return float(difference.max() if self.is_exact else difference.mean())


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found out about a server."""

    differences: Mapping[str, float] = field(default_factory=dict)
    """In nats, by what was compared."""
    parts: frozenset[str] = frozenset()
    """The parts of adapters that it computes as we do."""
    fault: str | None = None
    """Why it cannot be used at all."""


def parts_of(layout: AdapterLayout, head_name: str) -> frozenset[str]:
    """The parts on which an adapter of this layout has matrices."""
    found = set()
    for name, place in layout.places.items():
        if place.shape.num_experts:
            found.add(EXPERTS)
        else:
            found.add(HEAD if name == head_name else LAYERS)
    return frozenset(found)


def expected_answers(sampler: Sampler, base_model: BaseModel) -> Expected:
    """Ask the built-in sampler, which has no active job."""
    info = base_model.info
    length = min(PROMPT_TOKENS, info.max_context_tokens - 1)
    prompt = np.random.default_rng(0).integers(0, info.vocab_size, length).astype(np.int32)
    job = SampleJob(
        prompt=prompt,
        sampling_params=SamplingParams(max_tokens=1, seed=0, stop=(), temperature=TEMPERATURE),
        prompt_logprobs=True,
        scoring=ScoringParams(topk_sample_logprobs=NUM_TOP),
    )
    base = _answer(sampler, job)
    top = base.sequences[0].top
    bound = tolerance(base_model.dtype)
    expected = Expected(
        job=job,
        logprobs=_logprobs(base),
        tempered={}
        if top is None
        else dict(zip(top.token_ids[0].tolist(), top.logprobs[0].tolist(), strict=True)),
        adapters={},
        largest_difference=bound,
        is_exact=base_model.dtype == torch.float32,
        base_model_name=info.name,
    )
    adapters = {}
    for part in (LAYERS, HEAD):
        if checked := _checked_adapter(sampler, base_model, part, expected):
            adapters[part] = checked
    return Expected(**{**expected.__dict__, "adapters": adapters})


def _checked_adapter(
    sampler: Sampler, base_model: BaseModel, part: str, expected: Expected
) -> CheckedAdapter | None:
    """A random adapter with an effect that can be seen; None if there is none."""
    shapes = {
        name: shape
        for name, shape in base_model.linear_shapes.items()
        if not shape.num_experts and (HEAD if name == base_model.head_name else LAYERS) == part
    }
    if not shapes:
        return None
    layout = AdapterLayout(LoraConfig(rank=RANK, alpha=float(RANK)), shapes)
    drawn = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(1))
    spread = FIRST_SPREAD
    while spread <= LARGEST_SPREAD:
        weights = AdapterTensors(layout, (drawn * spread).to(base_model.device))
        version = f"check of {part} {spread}"
        captured = CapturedTensors(
            weights=weights, buffers={}, step=0, base_model_name=base_model.info.name
        )
        sampler.publish(version, captured)
        try:
            output = _answer(sampler, SampleJob(**{**expected.job.__dict__, "version": version}))
        except TrainingError:  # so large that its numbers are not finite
            return None
        finally:
            sampler.retire(version)
        logprobs = _logprobs(output)
        effect = expected.difference(expected.logprobs[1:], logprobs[1:])
        if effect >= VISIBLE * expected.largest_difference:
            return CheckedAdapter(weights=weights, logprobs=logprobs)
        spread *= 2
    return None


def _answer(sampler: Sampler, job: SampleJob) -> SampleOutput:
    sampler.submit("check", job)
    result = None
    while result is None:
        result = sampler.poll(1.0).get("check")
    if isinstance(result, TrainingError):
        raise result
    return result


def _logprobs(output: SampleOutput) -> NDArray[np.float32]:
    return np.asarray(output.prompt_logprobs, np.float32)


async def prove(
    client: VllmClient, served: ServedModel, expected: Expected, folders: VersionFolders
) -> Proof:
    """Ask a server for the expected answers.

    Raises:
        ServerLost: It did not answer.
    """
    try:
        await _check_unknown_name(client, expected, folders)
        differences = await _base_differences(client, served, expected)
    except (WrongAnswer, ServerRefuses, NonFiniteResult) as error:
        return Proof(fault=str(error))
    for what, difference in differences.items():
        if not difference <= expected.largest_difference:
            return Proof(
                differences=differences,
                fault=f"{what} differs from ours by {difference:.2g} nats; expected at most "
                f"{expected.largest_difference:g}: does it serve the same weights?",
            )
    parts = set()
    for part, checked in expected.adapters.items():
        try:
            difference = await _adapter_difference(client, checked, expected, folders)
        except (WrongAnswer, ServerRefuses, NonFiniteResult, OSError):
            difference = math.nan
        differences[f"an adapter on {part}"] = difference
        if difference <= expected.largest_difference:
            parts.add(part)
    return Proof(differences=differences, parts=frozenset(parts))


async def _check_unknown_name(
    client: VllmClient, expected: Expected, folders: VersionFolders
) -> None:
    body = _body(expected, f"{folders.owner}-never-loaded")
    try:
        await client.generate(body)
    except ServerRefuses as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return
        raise
    raise WrongAnswer(
        "it answers requests for adapters that it does not have; start it without "
        "VLLM_SKIP_MODEL_NAME_VALIDATION"
    )


async def _base_differences(
    client: VllmClient, served: ServedModel, expected: Expected
) -> dict[str, float]:
    content = await client.generate(_body(expected, served.name))
    check_model(content, served.name)
    (choice,) = read_choices(only_choice(content), NUM_TOP)
    theirs = dict(zip(*choice.top, strict=True))
    common = expected.tempered.keys() & theirs.keys()
    return {
        "the base model": _scores_difference(content, expected, expected.logprobs),
        f"temperature {TEMPERATURE:g}": expected.difference(
            [expected.tempered[token] for token in common], [theirs[token] for token in common]
        )
        if common
        else math.nan,
    }


async def _adapter_difference(
    client: VllmClient, checked: CheckedAdapter, expected: Expected, folders: VersionFolders
) -> float:
    folder = folders.new()
    write_adapter(
        folder, checked.weights.layout, checked.weights.flat.cpu(), expected.base_model_name
    )
    await client.load(folder.name, str(folder))
    content = await client.generate(_body(expected, folder.name))
    check_model(content, folder.name)
    await client.unload(folder.name)
    folders.remove(folder)  # its only request was answered
    return _scores_difference(content, expected, checked.logprobs)


def _scores_difference(
    content: Mapping[str, Any], expected: Expected, ours: NDArray[np.float32]
) -> float:
    theirs = read_scores(content, expected.job).logprobs
    return math.nan if theirs is None else expected.difference(ours[1:], theirs[1:])


def _body(expected: Expected, model: str) -> dict[str, Any]:
    return request_body(
        expected.job,
        0,
        request_id=f"check-{model}",
        model=model,
        max_tokens=1,
        end_token_ids=(),
        salt="check",
    )
