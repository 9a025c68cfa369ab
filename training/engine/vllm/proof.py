"""The check of a server: does it compute what the built-in sampler computes?

A server with other weights, another dtype or another definition of a log-probability would answer
without an error. So the built-in sampler computes some log-probabilities once, and each server is
asked for the same before it gets a job: of the base model, of a tempered distribution, and of two
random adapters, one on the output head and one on all other layers; then of the base model again,
while adapters are in all slots of the server and in its batch. It must also refuse a name that
it does not know, because a request for a version that it has lost would otherwise be answered with
the base model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from training.types import LoraConfig, SampledSequence, SamplingParams, ScoringParams

logger = logging.getLogger(__name__)

HEAD, LAYERS, EXPERTS = "the output head", "layers", "experts"
"""The parts of adapters: each is proven separately. Experts are left to the built-in sampler."""

PROMPT_TOKENS = 24
NUM_TOP = 5
TEMPERATURE = 0.5
GREEDY_TOKENS = 4
COMPANION_TOKENS = 100
"""Of a request beside it, so that the two share their batches."""
GREEDY_PROMPTS = 8
"""Of so many prompts the one is taken after which the choices are clearest."""
RANK = 8
"""Of the random adapters, or ``max_lora_rank`` if that is less."""
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
    whole_adapter: CheckedAdapter | None
    """One on all of these parts."""
    largest_difference: float
    """In nats: what rounding explains."""
    is_exact: bool
    """Whether every number is compared (float32), or their mean."""
    base_model_name: str
    greedy_job: SampleJob
    """Asks for the likeliest tokens, one after another."""
    greedy: SampledSequence

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
    base_name: str = ""
    """The name to use for the base model."""
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


def expected_answers(sampler: Sampler, base_model: BaseModel, *, max_rank: int) -> Expected:
    """Ask the built-in sampler, which has no active job.

    Args:
        max_rank: The largest rank that the server takes.
    """
    info = base_model.info
    length = min(PROMPT_TOKENS, max(1, info.max_context_tokens - COMPANION_TOKENS))
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
    greedy_job, greedy = _clearest_greedy(sampler, info.vocab_size, length)
    expected = Expected(
        job=job,
        logprobs=_logprobs(base),
        tempered={}
        if top is None
        else dict(zip(top.token_ids[0].tolist(), top.logprobs[0].tolist(), strict=True)),
        adapters={},
        whole_adapter=None,
        largest_difference=bound,
        is_exact=base_model.dtype == torch.float32,
        base_model_name=info.name,
        greedy_job=greedy_job,
        greedy=greedy,
    )
    adapters = {}
    for part in (LAYERS, HEAD):
        found = _checked_adapter(sampler, base_model, {part}, expected, min(RANK, max_rank))
        if found is not None:
            adapters[part] = found
    whole = _checked_adapter(sampler, base_model, {*adapters}, expected, min(RANK, max_rank))
    return replace(expected, adapters=adapters, whole_adapter=whole)


def _clearest_greedy(
    sampler: Sampler, vocab_size: int, length: int
) -> tuple[SampleJob, SampledSequence]:
    """A prompt whose likeliest continuation rounding does not change, and that continuation."""
    found = []
    for number in range(GREEDY_PROMPTS):
        prompt = np.random.default_rng(1 + number).integers(0, vocab_size, length).astype(np.int32)
        params = SamplingParams(max_tokens=GREEDY_TOKENS, seed=0, stop=(), temperature=0.0)
        scoring = ScoringParams(topk_sample_logprobs=NUM_TOP)
        job = SampleJob(prompt=prompt, sampling_params=params, scoring=scoring)
        (sequence,) = _answer(sampler, job).sequences
        if sequence.top is not None:
            margin = float((sequence.top.logprobs[:, 0] - sequence.top.logprobs[:, 1]).min())
            found.append((margin, number, job, sequence))
    _, _, job, sequence = max(found)
    return job, sequence


def _checked_adapter(
    sampler: Sampler, base_model: BaseModel, parts: set[str], expected: Expected, rank: int
) -> CheckedAdapter | None:
    """A random adapter on these parts with an effect that can be seen; None if there is none."""
    shapes = {
        name: shape
        for name, shape in base_model.linear_shapes.items()
        if not shape.num_experts and (HEAD if name == base_model.head_name else LAYERS) in parts
    }
    if not shapes:
        return None
    layout = AdapterLayout(LoraConfig(rank=rank, alpha=float(rank)), shapes)
    drawn = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(1))
    spread = FIRST_SPREAD
    while spread <= LARGEST_SPREAD:
        weights = AdapterTensors(layout, (drawn * spread).to(base_model.device))
        version = f"check of {sorted(parts)} {spread}"
        captured = CapturedTensors(
            weights=weights, buffers={}, step=0, base_model_name=base_model.info.name
        )
        sampler.publish(version, captured)
        try:
            output = _answer(sampler, replace(expected.job, version=version))
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


class Prover:
    """Asks a server for the expected answers."""

    def __init__(
        self, expected: Expected, folders: VersionFolders, *, num_slots: int, may_change: bool
    ) -> None:
        """
        Args:
            num_slots: Adapters in one batch of the server.
            may_change: Whether another server may take its address unnoticed.
        """
        self._may_change = may_change
        self._expected = expected
        self._folders = folders
        self._num_slots = num_slots
        self._neutral: Path | None = None
        """The folder of an adapter without an effect, once it was needed."""

    async def prove(self, client: VllmClient, served: ServedModel) -> Proof:
        """Check a server.

        Raises:
            ServerLost: It did not answer.
        """
        differences: dict[str, float] = {}
        base_name = served.name
        try:
            await self._check_unknown_name(client)
            if self._may_change:  # another server does not know this name
                base_name = await self._load_neutral(client)
            differences |= await self._base_differences(client, base_name)
            if self._wrong(differences):
                base_name = await self._load_neutral(client)
                again = await self._base_differences(client, base_name)
                differences = differences if self._wrong(again) else again
        except (WrongAnswer, ServerRefuses, NonFiniteResult, OSError) as error:
            return Proof(differences=differences, fault=str(error))
        if what := self._wrong(differences):
            return Proof(
                differences=differences,
                fault=f"{what} differs from ours by {differences[what]:.2g} nats; expected at most "
                f"{self._expected.largest_difference:g}: does it serve the same weights?",
            )
        parts = set()
        for part, checked in self._expected.adapters.items():
            name = f"an adapter on {part}"
            differences[name] = await self._adapter_difference(client, checked)
            if differences[name] <= self._expected.largest_difference:
                parts.add(part)
        if parts:
            base_name, beside = await self._base_beside_adapters(client, base_name, parts)
            differences["the base model beside adapters"] = beside
            if not beside <= self._expected.largest_difference:
                return Proof(
                    differences=differences,
                    fault=f"beside adapters the base model differs from ours by {beside:.2g} nats",
                )
        return Proof(differences=differences, parts=frozenset(parts), base_name=base_name)

    def _wrong(self, differences: Mapping[str, float]) -> str | None:
        """The first one that rounding does not explain."""
        bound = self._expected.largest_difference
        return next((what for what, value in differences.items() if not value <= bound), None)

    async def _check_unknown_name(self, client: VllmClient) -> None:
        try:
            await client.generate(self._body(f"{self._folders.owner}-never-loaded"))
        except ServerRefuses as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return
            raise
        raise WrongAnswer(
            "it answers requests for adapters that it does not have; start it without "
            "VLLM_SKIP_MODEL_NAME_VALIDATION"
        )

    async def _base_differences(self, client: VllmClient, model: str) -> dict[str, float]:
        content = await self._ask(client, model)
        (choice,) = read_choices(only_choice(content), NUM_TOP)
        theirs = dict(zip(*choice.top, strict=True))
        common = self._expected.tempered.keys() & theirs.keys()
        return {
            "the base model": self._scores_difference(content, self._expected.logprobs),
            f"temperature {TEMPERATURE:g}": self._expected.difference(
                [self._expected.tempered[token] for token in common],
                [theirs[token] for token in common],
            )
            if common
            else math.nan,
        }

    async def _adapter_difference(self, client: VllmClient, checked: CheckedAdapter) -> float:
        """NaN if the server does not take the adapter."""
        folder = self._folders.new()
        try:
            self._write(folder, checked.weights.layout, checked.weights.flat.cpu())
            await client.load(folder.name, str(folder))
            content = await self._ask(client, folder.name)
            await client.unload(folder.name)
            return self._scores_difference(content, checked.logprobs)
        except (WrongAnswer, ServerRefuses, NonFiniteResult, OSError):
            return math.nan
        finally:
            self._folders.remove(folder)  # its only request was answered

    async def _base_beside_adapters(
        self, client: VllmClient, model: str, parts: set[str]
    ) -> tuple[str, float]:
        """The name to use for the base model, and how far it is from ours while adapters are in all
        slots of the server, and in the same batch."""
        checked = self._expected.whole_adapter
        if checked is None or parts != self._expected.adapters.keys():
            checked = self._expected.adapters[min(parts)]
        folder = self._folders.new()
        names = [f"{folder.name}-{slot}" for slot in range(self._num_slots)]
        try:
            self._write(folder, checked.weights.layout, checked.weights.flat.cpu())
            for name in names:
                await client.load(name, str(folder))
                await client.generate(self._body(name))
            difference = await self._greedy_difference(client, model, beside=names[-1])
            if not difference <= self._expected.largest_difference:
                model = await self._load_neutral(client)
                difference = await self._greedy_difference(client, model, beside=names[-1])
            return model, difference
        except (WrongAnswer, ServerRefuses, NonFiniteResult, OSError) as error:
            logger.error("the vLLM server beside adapters: %s", error)
            return model, math.nan
        finally:
            for name in names:
                await client.forget(name)
            self._folders.remove(folder)  # all of its requests were answered

    async def _load_neutral(self, client: VllmClient) -> str:
        """The name of an adapter of zeros.

        vLLM's CPU kernels take the index -1, which stands for no adapter, for the last slot, so
        that the base model gets whatever adapter is there. The index of this one is never -1.
        """
        checked = self._expected.whole_adapter
        if checked is None:
            raise WrongAnswer("no adapter can be checked")
        if self._neutral is None:
            folder, layout = self._folders.new(), checked.weights.layout
            self._write(folder, layout, torch.zeros(layout.num_parameters))
            self._neutral = folder
        await client.ensure_loaded(self._neutral.name, str(self._neutral))
        return self._neutral.name

    async def _greedy_difference(self, client: VllmClient, model: str, *, beside: str) -> float:
        """The likeliest tokens one after another, as far as both choose the same, while another
        model is sampled in the same batch."""
        expected = self._expected
        companion = self._body(beside, expected.greedy_job, max_tokens=COMPANION_TOKENS)
        companion["request_id"] += "-beside"
        async with client.stream(companion) as chunks:
            await anext(chunks)
            body = self._body(model, expected.greedy_job, max_tokens=GREEDY_TOKENS)
            content = await client.generate(body)
        await client.abort([companion["request_id"]])
        check_model(content, model)
        ours, theirs = [], []
        for token, logprob, choice in zip(
            expected.greedy.tokens,
            expected.greedy.logprobs,
            read_choices(only_choice(content), NUM_TOP),
            strict=True,
        ):
            ours.append(logprob)
            theirs.append(dict(zip(*choice.top, strict=True)).get(token, math.nan))
            if choice.token != token:
                break
        return expected.difference(ours, theirs)

    def _write(self, folder: Path, layout: AdapterLayout, flat: Tensor) -> None:
        write_adapter(folder, layout, flat, self._expected.base_model_name)

    async def _ask(self, client: VllmClient, model: str) -> dict[str, Any]:
        content = await client.generate(self._body(model))
        check_model(content, model)
        return content

    def _body(
        self, model: str, job: SampleJob | None = None, *, max_tokens: int = 1
    ) -> dict[str, Any]:
        """Of the expected job, if no other is given."""
        return request_body(
            self._expected.job if job is None else job,
            0,
            request_id=f"{self._folders.owner}-check-{model}",  # others may check it, too
            model=model,
            max_tokens=max_tokens,
            end_token_ids=(),
            salt="check",
        )

    def _scores_difference(self, content: Mapping[str, Any], ours: NDArray[np.float32]) -> float:
        theirs = read_scores(content, self._expected.job).logprobs
        return math.nan if theirs is None else self._expected.difference(ours[1:], theirs[1:])
