"""The fake sampler: text drawn from a hash of its inputs.

A sequence's tokens depend on its version's weights, the prompt, the seed and the sequence's number,
and on nothing else. Imports numpy and no torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.engine.fake.checkpoint import FakeCapture, FloatArray, read_checkpoint
from training.engine.interface import CapturedAdapter, SampleJob, SampleOutput, Sampler
from training.engine.sampler.versions import Versions
from training.errors import ContextLengthExceeded, InvalidRequest, TrainingError
from training.types import NO_DATA_LOGPROB, PromptScores, SampledSequence, TopLogprobs

END_TOKEN = 256
VOCAB_SIZE = 257


@dataclass(eq=False)
class _FakeSampling:
    job: SampleJob
    digest: bytes
    """Hash of all inputs of the text: weights, prompt and seed."""
    tokens: list[list[int]]
    cached_prompt_tokens: int
    stop_reasons: list[str | None]


class FakeSampler(Sampler):
    """Samples printable bytes drawn from a hash; one token per sequence and step."""

    def __init__(self, max_context_tokens: int) -> None:
        self._max_context_tokens = max_context_tokens
        self._on_progress: Callable[[], None] = lambda: None
        self._versions: Versions[bytes] = Versions()
        self._active: dict[str, _FakeSampling] = {}
        self._read: set[tuple[str, str | None, bytes]] = set()
        """Owner, version and tokens of each prompt that was read."""

    def report_progress(self, to: Callable[[], None]) -> None:
        self._on_progress = to

    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        self._versions.publish(version, lambda: _weights_of(weights).tobytes())

    def retire(self, version: str) -> None:
        self._versions.retire(version)

    @property
    def versions(self) -> Mapping[str, int]:
        return self._versions.num_jobs

    def submit(self, key: str, job: SampleJob) -> None:
        if key in self._active:
            raise ValueError(f"a job is active under the key {key!r}")
        if not len(job.prompt):
            raise InvalidRequest("prompt: empty")
        if job.prompt.min() < 0 or job.prompt.max() >= VOCAB_SIZE:
            raise InvalidRequest(f"prompt: a token is not in the vocabulary of {VOCAB_SIZE}")
        room = self._max_context_tokens - len(job.prompt)
        if room < 0 or (room == 0 and job.sampling_params.max_tokens != 0):
            raise ContextLengthExceeded(
                f"prompt: {len(job.prompt)} tokens leave no room in the context: this model's "
                f"maximum context length is {self._max_context_tokens} tokens"
            )
        weights = self._versions.begin_job(job.version) or b""
        seed = f"{job.sampling_params.seed}:{job.prompt.tolist()}".encode()
        self._active[key] = _FakeSampling(
            job,
            hashlib.sha256(weights + seed).digest(),
            [[] for _ in range(job.num_samples)],
            self._read_prompt(job),
            ["length" if job.sampling_params.max_tokens == 0 else None] * job.num_samples,
        )

    def _read_prompt(self, job: SampleJob) -> int:
        """The tokens of a prompt that the cache has: of a repeated one all but the last."""
        key = (job.group, job.version, job.prompt.tobytes())
        if key in self._read:
            return len(job.prompt) - 1
        self._read.add(key)
        return 0

    def poll(self, wait_seconds: float) -> dict[str, SampleOutput | TrainingError]:
        deadline = time.monotonic() + wait_seconds
        finished: dict[str, SampleOutput | TrainingError] = {}
        while self._active and not finished:
            for key, sampling in list(self._active.items()):
                for i, reason in enumerate(sampling.stop_reasons):
                    if reason is None:
                        sampling.stop_reasons[i] = self._advance(sampling, i)
                if all(sampling.stop_reasons):
                    finished[key] = _finish(sampling)
                    self.cancel(key)
            self._on_progress()
            if time.monotonic() >= deadline:
                break
        return finished

    def progress(self, key: str) -> list[str]:
        if key not in self._active:
            raise ValueError(f"no job is active under the key {key!r}")
        sampling = self._active[key]
        stop = sampling.job.sampling_params.stop
        texts = [_said(tokens, sampling.job) for tokens in sampling.tokens]
        held_back = max((len(s) for s in stop or () if isinstance(s, str)), default=1) - 1
        return [text[: max(0, len(text) - held_back)] for text in texts]

    def cancel(self, key: str) -> int:
        sampling = self._active.pop(key, None)
        if sampling is None:
            return 0
        self._versions.end_job(sampling.job.version)
        return sum(map(len, sampling.tokens))

    def release_memory(self) -> None:
        self._read.clear()

    @property
    def active(self) -> int:
        return len(self._active)

    def _advance(self, sampling: _FakeSampling, i: int) -> str | None:
        """Sample one token of sequence i; return why it ended, if it did."""
        params, tokens = sampling.job.sampling_params, sampling.tokens[i]
        room = self._max_context_tokens - len(sampling.job.prompt)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        drawn = hashlib.sha256(sampling.digest + f"{i}:{len(tokens)}".encode()).digest()
        # One printable byte, or the end of the turn once in 32 times.
        tokens.append(END_TOKEN if drawn[1] < 8 else 32 + drawn[0] % 95)
        stop = params.stop
        if tokens[-1] in params.stop_token_ids:
            return "stop"
        if stop is None and tokens[-1] == END_TOKEN and not params.ignore_eos:
            return "stop"
        if any(s == tokens[-1] or (isinstance(s, str) and s in _text(tokens)) for s in stop or ()):
            return "stop"
        return "length" if len(tokens) >= limit else None


def _weights_of(weights: CapturedAdapter | Path) -> FloatArray:
    if isinstance(weights, Path):
        return read_checkpoint(weights, with_optimizer=False)[0]["weights"]
    if not isinstance(weights, FakeCapture):
        raise TypeError(f"{type(weights).__name__} was not captured by a fake trainer")
    return weights.arrays["weights"]


def _finish(sampling: _FakeSampling) -> SampleOutput:
    sequences = [
        SampledSequence(
            tokens=tokens,
            logprobs=[-float(np.log(VOCAB_SIZE))] * len(tokens),
            stop_reason=reason or "length",
            text=_said(tokens, sampling.job),
            top=_top(len(tokens), sampling.job.scoring.topk_sample_logprobs),
        )
        for tokens, reason in zip(sampling.tokens, sampling.stop_reasons, strict=True)
    ]
    scores = _scores(sampling.job)
    prompt_logprobs = None if scores.logprobs is None else scores.logprobs.tolist()
    return SampleOutput(
        sequences=sequences,
        prompt_logprobs=prompt_logprobs,
        scores=scores,
        cached_prompt_tokens=sampling.cached_prompt_tokens,
    )


def _scores(job: SampleJob) -> PromptScores:
    """Every token is as likely as any other; drawn alternatives are all token 0."""
    length, scoring = len(job.prompt), job.scoring
    scored_from = length - (scoring.prompt_logprobs_last_n or length - 1)
    logprobs = np.full(length, -np.log(VOCAB_SIZE), np.float32)
    logprobs[:scored_from] = np.nan
    targets = scoring.target_prompt_logprobs
    alternatives = (length - 1, scoring.prompt_alt_tokens_k)
    return PromptScores(
        logprobs=logprobs if job.prompt_logprobs else None,
        top=_top(length, scoring.topk_prompt_logprobs, scored_from),
        target_logprobs=None
        if targets is None
        else np.where(targets >= 0, -np.log(VOCAB_SIZE), 0.0).astype(np.float32),
        alternatives=(
            np.zeros(alternatives, np.int64),
            np.full(alternatives, -np.log(VOCAB_SIZE), np.float32),
        )
        if scoring.prompt_alt_tokens_k
        else None,
    )


def _top(length: int, k: int, scored_from: int = 0) -> TopLogprobs | None:
    """The first k tokens at every position from ``scored_from`` on."""
    if not k:
        return None
    token_ids = np.tile(np.arange(k, dtype=np.int32), (length, 1))
    logprobs = np.full((length, k), -np.log(VOCAB_SIZE), np.float32)
    empty = np.s_[:scored_from], np.s_[:, VOCAB_SIZE:]
    for cells in empty:
        token_ids[cells], logprobs[cells] = 0, NO_DATA_LOGPROB
    return TopLogprobs(token_ids=token_ids, logprobs=logprobs)


def _text(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token != END_TOKEN).decode()


def _said(tokens: Sequence[int], job: SampleJob) -> str:
    """The text without its stop string or end token."""
    params = job.sampling_params
    hides_last = bool(tokens) and tokens[-1] in params.stop_token_ids
    text = _text(tokens[:-1] if hides_last else tokens)
    for mark in params.stop or ():
        if isinstance(mark, str):
            text = text.partition(mark)[0]
    return text
