"""The sample futures that are inside the sampler: from a request to prompts, and back.

A request may hold several prompts; each is a separate job of the sampler, and the
future is finished when the last of them is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from django.db import DatabaseError

from futures.finishing import Outcome
from futures.models import Future
from futures.notify import notify_progress
from training.engine.interface import Renderer, SampleJob, SampleOutput, Sampler
from training.errors import LimitExceeded, TrainingError
from training.kinds import Sample
from training.services.recorded_samples import samples_record
from training.text_pieces import Told
from training.types import TokenIds, TokenPrompt
from training.worker import outcomes
from training.worker.kinds import sample
from training.worker.rollouts import Origin, Rollouts
from training.worker.text_work import of_prompt
from training.worker.texts import Texts

logger = logging.getLogger(__name__)


MAX_ECHOED = 1_000_000
"""Most tokens and likely tokens of prompts in one answer; each is some bytes of JSON."""


@dataclass
class _Sampling:
    """One sample future inside the sampler."""

    future: Future
    request: Sample
    model_id: str | None
    prompts: list[TokenIds]
    origin: Origin | None = None
    """The run that is sampled, if its sequences are to be shown to people."""
    outputs: list[SampleOutput | None] = field(default_factory=list)
    """One per prompt, None until it is finished."""
    prompt_tokens: int = 0
    """Tokens of all prompts."""
    told: Told | None = None
    """The part of the texts that was sent to followers; None if it is not streamed."""
    echoed: list[tuple[TokenIds, str | None]] = field(default_factory=list)
    """The prompts' tokens, and their texts if they were text, if the result has them."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A future that has left the sampler."""

    future: Future
    outcome: Outcome
    records: Sequence[Callable[[], None]] = ()
    """To be called in the transaction in which the outcome is committed."""


class Samples:
    """The samples of futures in one sampler."""

    def __init__(
        self, sampler: Sampler, renderer: Renderer, texts: Texts, rollouts: Rollouts
    ) -> None:
        self.rollouts = rollouts
        self._sampler = sampler
        self._renderer = renderer
        self._texts = texts
        self._held: dict[str, _Sampling] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def request_ids(self) -> list[str]:
        return list(self._held)

    @property
    def futures(self) -> list[Future]:
        return [sampling.future for sampling in self._held.values()]

    def submit(
        self,
        future: Future,
        request: Sample,
        *,
        model_id: str | None,
        version: str | None,
        origin: Origin | None = None,
    ) -> None:
        """Submit a request's prompts to the sampler.

        Args:
            request: The future's.
            model_id: For the answer; None if the request has no run.
            version: The version of weights to use; None for the base model.
            origin: The run of these weights, if what is sampled from it is to be recorded.

        Raises:
            TrainingError: One of the prompts cannot be sampled; none of them is.
        """
        keys: list[str] = []
        prompts: list[TokenIds] = []
        echoed: list[tuple[TokenIds, str | None]] = []
        prompt_tokens = 0
        try:
            if request.has_text:
                items = self._texts.take(future, request)
                rendered = [item for item in items if isinstance(item, TokenPrompt)]
            else:
                arrays = [prompt for prompt in request.prompts if isinstance(prompt, np.ndarray)]
                rendered = [TokenPrompt(tokens=tokens) for tokens in arrays]
            for index, (prompt, tokens) in enumerate(zip(request.prompts, rendered, strict=True)):
                job = SampleJob(
                    prompt=tokens.tokens,
                    images=tokens.images,
                    sampling_params=request.sampling_params,
                    num_samples=request.num_samples,
                    version=version,
                    prompt_logprobs=request.prompt_logprobs,
                    scoring=request.scoring,
                    group=str(future.owner_id),
                    is_followed=request.stream,
                )
                key = f"{future.id}:{index}"
                try:
                    self._sampler.submit(key, job)
                except TrainingError as error:
                    if not str(error).startswith("prompt: "):  # an error of all prompts
                        raise
                    raise of_prompt(error, index, len(rendered)) from error
                keys.append(key)
                prompts.append(job.prompt)
                prompt_tokens += len(job.prompt)
                if request.echo:
                    echoed.append((job.prompt, prompt if isinstance(prompt, str) else None))
                    num_likely = 1 + request.scoring.topk_prompt_logprobs
                    _check_echo(prompt_tokens * job.num_samples * num_likely)
        except TrainingError:
            for key in keys:
                self._sampler.cancel(key)
            raise
        self._held[future.id] = _Sampling(
            future=future,
            request=request,
            model_id=model_id,
            outputs=[None] * len(request.prompts),
            prompt_tokens=prompt_tokens,
            told=Told() if request.stream else None,
            echoed=echoed,
            prompts=prompts,
            origin=origin,
        )

    def poll(self, wait_seconds: float) -> list[Sampled]:
        """The finished futures, waiting up to ``wait_seconds`` for one; also sends progress
        notes."""
        finished: list[Sampled] = []
        deadline = time.monotonic() + wait_seconds
        while self._sampler.active and not finished:
            left = max(deadline - time.monotonic(), 0.0)
            for key, output in self._sampler.poll(left).items():
                finished += self._take(key, output)
            if time.monotonic() >= deadline:
                break
        self._tell_progress()
        return finished

    def _take(self, key: str, output: SampleOutput | TrainingError) -> list[Sampled]:
        """Store one prompt's output; return its future, if that was the last prompt."""
        request_id, _, index = key.rpartition(":")
        sampling = self._held.get(request_id)
        if sampling is None:  # another prompt failed, and with it the future
            return []
        if isinstance(output, TrainingError):
            self._cancel(sampling)
            outcome = outcomes.failed(sampling.future, output)
        else:
            sampling.outputs[int(index)] = output
            done = [item for item in sampling.outputs if item is not None]
            if len(done) < len(sampling.outputs):
                return []
            outcome = sample.ready(
                sampling.future,
                model_id=sampling.model_id,
                outputs=done,
                prompt_tokens=sampling.prompt_tokens,
                token_texts=self._renderer.token_texts if sampling.request.token_texts else None,
                prompt_texts=[
                    self._renderer.prompt_texts(tokens.tolist(), text)
                    for tokens, text in sampling.echoed
                ],
                scoring=sampling.request.scoring,
            )
        del self._held[request_id]
        records = [] if isinstance(output, TrainingError) else self._records(sampling)
        return [Sampled(sampling.future, outcome, records)]

    def _records(self, sampling: _Sampling) -> list[Callable[[], None]]:
        """The writings that belong to a finished sample."""
        records: list[Callable[[], None]] = []
        if sampling.request.record_for is not None:
            records.append(partial(_record, sampling))
        if sampling.origin is not None:
            outputs = [output for output in sampling.outputs if output is not None]
            records.append(
                self.rollouts.recorder(sampling.future, sampling.origin, sampling.prompts, outputs)
            )
        return records

    def withdraw(self, request_ids: Collection[str]) -> dict[str, tuple[Future, dict[str, int]]]:
        """Take requests out of the sampler.

        Returns:
            The removed ones, by request id: the future, and the number of tokens used for it,
            which is 0 before its first token.
        """
        withdrawn: dict[str, tuple[Future, dict[str, int]]] = {}
        for request_id in self._held.keys() & set(request_ids):
            sampling = self._held.pop(request_id)
            tokens = self._cancel(sampling)
            # A prompt is read before its first token is sampled.
            used = {"tokens": tokens, "prompt_tokens": sampling.prompt_tokens} if tokens else {}
            withdrawn[request_id] = (sampling.future, used)
        return withdrawn

    def _cancel(self, sampling: _Sampling) -> int:
        """Take all prompts of a future out of the sampler; returns how many tokens it sampled."""
        num_sampled = 0
        for index, output in enumerate(sampling.outputs):
            num_sampled += self._sampler.cancel(f"{sampling.future.id}:{index}")
            if output is not None:
                num_sampled += sum(len(sequence.tokens) for sequence in output.sequences)
        return num_sampled

    def _tell_progress(self) -> None:
        """Send the new text of streamed samples."""
        notes: list[tuple[str, str]] = []
        for request_id, sampling in self._held.items():
            if sampling.told is None:
                continue
            texts: list[str] = []
            for index, output in enumerate(sampling.outputs):
                if output is None:
                    texts += self._sampler.progress(f"{request_id}:{index}")
                else:
                    texts += [sequence.text for sequence in output.sequences]
            notes += [(request_id, piece.to_note()) for piece in sampling.told.pieces(texts)]
        if notes:
            try:
                notify_progress(notes)
            except DatabaseError as error:  # only a hint; the result has the whole text
                logger.warning("progress could not be sent: %s", error)


def _check_echo(num_entries: int) -> None:
    """Refuse an answer that would repeat too much.

    Raises:
        LimitExceeded: The message says what to do.
    """
    if num_entries > MAX_ECHOED:
        raise LimitExceeded(
            "echo: the prompts' tokens and their likely ones, once for each of n choices, are more"
            f" than the {MAX_ECHOED} that one answer may hold; send fewer prompts at a time"
        )


def _record(sampling: _Sampling) -> None:
    """Record the sample for the loss that names it."""
    samples_record(
        request_id=sampling.future.id,
        session_id=sampling.request.record_for or "",
        prompt=sampling.prompts[0],
        sequences=[
            {
                "tokens": np.asarray(sequence.tokens, np.int32),
                "logprobs": np.asarray(sequence.logprobs, np.float32),
            }
            for output in sampling.outputs
            if output is not None
            for sequence in output.sequences
        ],
    )
