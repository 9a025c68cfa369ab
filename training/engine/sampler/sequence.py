"""One sampling job from submission to answer: its parameters, progress and end.

It does not depend on passes, batches or the cache; ``continuous_batching`` advances it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from training.engine.interface import BaseModelInfo, SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.renderer.streamed_text import BEFORE_TOKENS, TextSoFar
from training.engine.sampler.block_table import BlockTable, Tokens
from training.engine.sampler.logit_changes import check_logit_changes
from training.engine.sampler.logits import Choice, UniformNumbers, check_choice_params
from training.engine.sampler.prompt_logprobs import PromptScorer, top_logprobs
from training.engine.sampler.stop_strings import StopWatch
from training.engine.torch.adapters import AdapterTensors
from training.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    NonFiniteResult,
    TrainingError,
)
from training.images import PlacedImage
from training.types import PromptScores, SampledSequence


@dataclass(kw_only=True, eq=False)
class ActiveSequence:
    """One sample of a job."""

    number: int
    """Its number among the job's samples, from 0."""
    uniforms: UniformNumbers
    stop_watch: StopWatch | None
    """None if the job has no stop strings."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    stop_reason: str | None = None
    """None while the sequence continues."""
    hides_last: bool = False
    """Whether its last token, one of ``stop_token_ids``, is not part of its text."""
    text_so_far: TextSoFar | None = None
    """Made when the progress of a sequence without stop strings is requested."""
    table: BlockTable | None = None
    """Its blocks of the packed layout's cache, if it has any."""

    def progress(self, text: ChatRenderer, prompt_end: Sequence[int]) -> str:
        """The certain part of its text."""
        if self.stop_watch is not None:
            return self.stop_watch.certain_text
        if self.text_so_far is None:
            self.text_so_far = TextSoFar(text.decode, prompt_end)
        return self.text_so_far.read(self.spoken)

    @property
    def spoken(self) -> list[int]:
        """The tokens of its text."""
        return self.tokens[:-1] if self.hides_last else self.tokens


@dataclass(kw_only=True, eq=False)
class ActiveRequest:
    """An active job."""

    key: str
    job: SampleJob
    max_tokens: int
    end_token_ids: frozenset[int]
    """A sequence that samples one of these has ended."""
    sequences: list[ActiveSequence]
    scorer: PromptScorer
    prompt_end: list[int]
    """The prompt's last tokens, before the sampled ones when they are decoded."""
    weights: AdapterTensors | None = None
    """The weights of the job's version; None for the base model."""
    number: int = 0
    """Its number among all jobs that have started, once it has."""
    num_read: int = 0
    """The number of the prompt's tokens that were read."""
    is_prefilled: bool = False
    """Whether the whole prompt was read."""
    cached_tokens: int = 0
    """The prompt's tokens that did not have to be read: they were still in the cache."""
    preempted: list[ActiveSequence] = field(default_factory=list)
    """Sequences that have lost their place in the cache, and wait for another."""
    rereads: list[ActiveSequence] = field(default_factory=list)
    """Sequences whose tokens are read again before they continue, the next one first."""
    skipped_positions: int = 0
    """Added to a sampled token's number for its rotary position: after images on several axes
    positions are not the numbers of tokens."""

    def length(self, sequence: ActiveSequence) -> int:
        """The tokens of a sequence so far, the prompt's included."""
        return len(self.job.prompt) + len(sequence.tokens)

    def tokens(self, sequence: ActiveSequence, start: int, end: int) -> list[int]:
        """The tokens of a sequence from position ``start`` up to, but without, ``end``."""
        split = len(self.job.prompt)
        sampled = sequence.tokens[max(start - split, 0) : max(end - split, 0)]
        return [*self.job.prompt[start:end].tolist(), *sampled]

    def naming(self, sequence: ActiveSequence) -> tuple[Tokens, Sequence[PlacedImage], str]:
        """What the keys of a sequence's blocks are made of, and the tag of the keys."""
        return partial(self.tokens, sequence), self.job.images, self.job.version or ""

    @property
    def needs_reading(self) -> bool:
        """Whether there is a prompt, or a sequence that lost its place, to read."""
        return not self.is_prefilled or bool(self.rereads)

    def note_read(self, num_tokens: int) -> None:
        """Record that this many of the prompt's tokens were read."""
        self.num_read = num_tokens
        self.is_prefilled = num_tokens == len(self.job.prompt)

    def decodable(self) -> Iterator[ActiveSequence]:
        """The unfinished sequences whose newest token can be read."""
        if self.is_prefilled:
            for sequence in self.unfinished():
                if sequence not in self.preempted and sequence not in self.rereads:
                    yield sequence

    def unfinished(self) -> Iterator[ActiveSequence]:
        return (sequence for sequence in self.sequences if sequence.stop_reason is None)

    def append(self, sequence: ActiveSequence, choice: Choice) -> None:
        """Add a token to one of the sequences, which may end with it."""
        sequence.tokens.append(choice.token)
        sequence.logprobs.append(choice.logprob)
        sequence.top.append(choice.top)
        if choice.token in self.end_token_ids or (
            sequence.stop_watch is not None and sequence.stop_watch.has_stopped(sequence.tokens)
        ):
            sequence.stop_reason = "stop"
            sequence.hides_last = choice.token in self.job.sampling_params.stop_token_ids
        elif len(sequence.tokens) == self.max_tokens:
            sequence.stop_reason = "length"

    def output(
        self, text: ChatRenderer, scores: PromptScores | None = None
    ) -> SampleOutput | TrainingError:
        """The result, once all sequences have ended.

        Args:
            scores: The prompt's, if another than the request's scorer has computed them.
        """
        if not self.scorer.is_finite:
            return NonFiniteResult()
        scores = scores or self.scorer.scores()
        sequences = [
            SampledSequence(
                tokens=sequence.tokens,
                logprobs=sequence.logprobs,
                stop_reason=sequence.stop_reason or "length",
                text=_text_of(sequence, text, self.prompt_end),
                top=top_logprobs(sequence.top, self.job.scoring.topk_sample_logprobs),
            )
            for sequence in self.sequences
        ]
        prompt_logprobs = None if scores.logprobs is None else scores.logprobs.tolist()
        return SampleOutput(
            sequences=sequences,
            prompt_logprobs=prompt_logprobs,
            scores=scores,
            cached_prompt_tokens=self.cached_tokens,
            prompt_end=self.prompt_end,
        )


def _text_of(sequence: ActiveSequence, text: ChatRenderer, prompt: Sequence[int]) -> str:
    if sequence.stop_watch is not None and sequence.stop_watch.text_before_stop is not None:
        return sequence.stop_watch.text_before_stop
    return text.decode_after(prompt, sequence.spoken)


def new_request(
    key: str,
    job: SampleJob,
    *,
    max_tokens: int,
    text: ChatRenderer,
    info: BaseModelInfo,
) -> ActiveRequest:
    """A job without sampled tokens and without weights.

    Raises:
        InvalidRequest: A sampling parameter has no meaning; the message names it.
    """
    params = job.sampling_params
    check_choice_params(params)
    check_logit_changes(params, info.vocab_size)
    if params.seed is None:
        raise InvalidRequest("seed: none was chosen")
    stop_strings = [stop for stop in params.stop or () if isinstance(stop, str)]
    stop_ids = [stop for stop in params.stop or () if not isinstance(stop, str)]
    if stop_strings and stop_ids:
        raise InvalidRequest("stop: either strings or token ids, not both")
    if "" in stop_strings:
        raise InvalidRequest("stop: an empty string would stop at once")
    for name, ids in (("stop", stop_ids), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequest(
                    f"{name}: token {token} is not in the vocabulary of {info.vocab_size}"
                )
    # A client's stop strings do not replace the end of the turn.
    natural_end = (params.stop is None or bool(stop_strings)) and not params.ignore_eos
    end_token_ids = set(text.end_token_ids) if natural_end else set[int]()
    prompt_end = job.prompt[-BEFORE_TOKENS:].tolist()
    return ActiveRequest(
        key=key,
        job=job,
        max_tokens=max_tokens,
        scorer=PromptScorer(job, info.vocab_size),
        prompt_end=prompt_end,
        end_token_ids=frozenset(end_token_ids | {*stop_ids, *params.stop_token_ids}),
        sequences=[
            ActiveSequence(
                number=number,
                uniforms=UniformNumbers(params.seed, number),
                stop_watch=StopWatch(
                    text.decode,
                    stop_strings,
                    before=prompt_end,
                    special_texts=text.special_texts,
                )
                if stop_strings
                else None,
            )
            for number in range(job.num_samples)
        ],
    )


def check_prompt(job: SampleJob, info: BaseModelInfo) -> None:
    """Refuse a prompt that cannot be continued or, if no token is requested, not read.

    Raises:
        InvalidRequest: It is empty, or has a token out of vocabulary.
        ContextLengthExceeded: It leaves no room in the context.
    """
    prompt = job.prompt
    if not len(prompt):
        raise InvalidRequest("prompt: empty")
    room = info.max_context_tokens - len(prompt)
    if room < 0 or (room == 0 and job.sampling_params.max_tokens != 0):
        raise ContextLengthExceeded(
            f"prompt: {len(prompt)} tokens leave no room in the context: this model's maximum "
            f"context length is {info.max_context_tokens} tokens, sampled ones included"
        )
    unknown = np.flatnonzero((prompt < 0) | (prompt >= info.vocab_size))
    if len(unknown):
        raise InvalidRequest(
            f"prompt[{unknown[0]}]: token {prompt[unknown[0]]} is not in the vocabulary of "
            f"{info.vocab_size}"
        )
