"""What was sampled from a run, prepared for people: rows with texts, and digests that find the
sequences again in a training request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from futures.models import Future
from futures.plain import plain_text
from training.engine.interface import SampleOutput
from training.errors import CheckpointNotFound
from training.kinds import Sample
from training.loss_fns import ADVANTAGES, TARGET_TOKENS
from training.models import Rollout, Run
from training.pass_figures import sampled_tokens
from training.selectors import checkpoint_by_id
from training.services.rollouts import rollouts_record
from training.types import Datum, SampledSequence, TokenIds
from training.vocabulary import TokenTable

MAX_CHARACTERS = 8_000
"""Of a prompt and of a completion; longer ones lose their middle."""
MAX_PROMPT_TOKENS = 4_000
"""Of a prompt, whose beginning and end are made into text."""
MAX_SEQUENCES = 256
"""Of a request; further ones are only counted."""
MAX_TURNS = 16_384
"""Completions of a training request that are looked for, so that no request delays others."""
CACHED = 256


@dataclass(frozen=True)
class Origin:
    """The run and the step whose weights a request samples from."""

    run_id: str
    step: int
    owner_id: int


class Rollouts:
    """Prepares rows of finished samples. Nothing is written here."""

    def __init__(self, token_table: TokenTable | None) -> None:
        self._token_table = token_table
        self._checkpoints: OrderedDict[int, Origin | None] = OrderedDict()
        self._prompts: OrderedDict[bytes, str] = OrderedDict()

    def origin(self, future: Future, request: Sample, run: Run | None) -> Origin | None:
        """The run that is sampled; None for a base model, for another owner's checkpoint, and for
        requests that only score their prompts."""
        is_scoring = request.prompt_logprobs or request.scoring.topk_prompt_logprobs > 0
        if is_scoring and (request.sampling_params.max_tokens or 0) <= 1:
            return None
        if run is not None:
            return Origin(run.id, run.step, run.owner_id)
        if request.checkpoint is None:
            return None
        origin = self._of_checkpoint(request.checkpoint)
        return origin if origin is not None and origin.owner_id == future.owner_id else None

    def recorder(
        self,
        future: Future,
        origin: Origin,
        prompts: Sequence[TokenIds],
        outputs: Sequence[SampleOutput],
    ) -> Callable[[], None]:
        """The writing of a finished request, for the transaction that commits its result."""
        number = 0
        rows: list[Rollout] = []
        sequences = [sequence for output in outputs for sequence in output.sequences]
        for prompt, output in zip(prompts, outputs, strict=True):
            prompt_digest = token_digest(prompt)
            for sequence in output.sequences:
                if number < min(MAX_SEQUENCES, settings.ROLLOUTS_PER_RUN):
                    rows.append(self._row(future, origin, number, prompt, prompt_digest, sequence))
                number += 1
        sums = {
            "run_id": origin.run_id,
            "step": origin.step,
            "sequences": len(sequences),
            "tokens": sum(len(sequence.tokens) for sequence in sequences),
            "stopped_by_length": sum(item.stop_reason == "length" for item in sequences),
            "logprob_sum": float(sum(sum(sequence.logprobs) for sequence in sequences)),
        }
        return partial(rollouts_record, rows, sums)

    def _row(
        self,
        future: Future,
        origin: Origin,
        number: int,
        prompt: TokenIds,
        prompt_digest: bytes,
        sequence: SampledSequence,
    ) -> Rollout:
        tokens = np.asarray(sequence.tokens, np.int32)
        return Rollout(
            run_id=origin.run_id,
            step=origin.step,
            request_id=future.id,
            number=number,
            prompt_digest=prompt_digest,
            sequence_digest=token_digest(np.concatenate([prompt, tokens])),
            prompt=self._prompt_text(prompt, prompt_digest),
            completion=plain_text(sequence.text, MAX_CHARACTERS),
            prompt_tokens=len(prompt),
            tokens=len(tokens),
            stop_reason=sequence.stop_reason,
            logprob_mean=float(np.mean(sequence.logprobs)) if len(tokens) else None,
        )

    def _of_checkpoint(self, checkpoint_id: int) -> Origin | None:
        if checkpoint_id not in self._checkpoints:
            try:
                row = checkpoint_by_id(checkpoint_id)
                origin = Origin(row.run_id, row.step, row.run.owner_id)
            except CheckpointNotFound:
                origin = None
            _remember(self._checkpoints, checkpoint_id, origin)
        return self._checkpoints[checkpoint_id]

    def _prompt_text(self, prompt: TokenIds, digest: bytes) -> str:
        """The prompt's text; sequences of a group share it."""
        table = self._token_table
        if table is None:
            return ""
        if digest not in self._prompts:
            half = MAX_PROMPT_TOKENS // 2
            ids = prompt.tolist()
            parts = [ids] if len(ids) <= MAX_PROMPT_TOKENS else [ids[:half], ids[-half:]]
            text = " … ".join(table.text(part) for part in parts)
            _remember(self._prompts, digest, plain_text(text, MAX_CHARACTERS))
        return self._prompts[digest]


def token_digest(tokens: NDArray[np.int32]) -> bytes:
    """16 bytes that stand for a sequence of tokens."""
    return _hash(tokens).digest()


def sequence_advantages(data: Sequence[Datum]) -> list[tuple[bytes, float]]:
    """Each sampled completion of some datums: the digest of its prompt and itself, and the mean of
    its advantages. A datum of several turns has one for each; one of an uploaded loss may have no
    targets."""
    turns = (item for datum in data if _has_targets(datum) for item in _turns(datum))
    return list(islice(turns, MAX_TURNS))


def _has_targets(datum: Datum) -> bool:
    targets = datum.loss_fn_inputs.get(TARGET_TOKENS)
    return targets is not None and np.shape(targets) == (len(datum.model_input),)


def _turns(datum: Datum) -> Iterator[tuple[bytes, float]]:
    targets = np.asarray(datum.loss_fn_inputs[TARGET_TOKENS], np.int32)
    advantages = datum.loss_fn_inputs[ADVANTAGES]
    is_sampled = np.concatenate([[False], sampled_tokens(datum), [False]])
    edges = np.flatnonzero(np.diff(is_sampled)).reshape(-1, 2)
    seen = _hash(np.asarray(datum.model_input[:1], np.int32))
    done = 0
    for begin, end in edges.tolist():
        seen.update(targets[done:end].astype("<i4").tobytes())
        done = end
        yield seen.copy().digest(), float(np.mean(advantages[begin:end], dtype=np.float64))


def _hash(tokens: NDArray[np.int32]) -> hashlib.blake2b:
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16)


def _remember(cache: OrderedDict[Any, Any], key: object, value: object) -> None:
    cache[key] = value
    if len(cache) > CACHED:
        cache.popitem(last=False)
