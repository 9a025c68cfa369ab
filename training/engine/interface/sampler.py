"""The sampler: prompts in, sequences out, many at a time, under versions of weights that do not
change.

It may compute in this process, beside the trainer and on the same base model, or have a server
do it. A caller cannot tell: it publishes versions, submits jobs that name them, and polls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.engine.interface.values import CapturedAdapter
from training.errors import TrainingError
from training.types import (
    PromptScores,
    SampledSequence,
    SamplingParams,
    ScoringParams,
    TokenIds,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleJob:
    """One sampling request: S sequences that continue one prompt."""

    prompt: TokenIds
    """(T,)"""
    sampling_params: SamplingParams
    """``seed`` is set: whoever builds the job has chosen one."""
    num_samples: int = 1
    """S."""
    version: str | None = None
    """A published version of an adapter's weights, or None for the base model."""
    prompt_logprobs: bool = False
    scoring: ScoringParams = field(default_factory=ScoringParams)
    """The log-probabilities that few ask for."""
    group: str = ""
    """Whom it is for: where not all jobs fit at once, groups share what there is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOutput:
    """A finished sampling job."""

    sequences: list[SampledSequence]
    """S of them, in the order of their numbers; log-probabilities in nats, in float32."""
    prompt_logprobs: list[float] | None
    """One per prompt token when asked for; the first is NaN, since nothing precedes it."""
    scores: PromptScores = field(default_factory=PromptScores)
    """What else was asked of the prompt."""
    prompt_end: Sequence[int] = ()
    """The prompt's last tokens, after which ``Renderer.token_texts`` reads the sequences."""


class Sampler(ABC):
    """Continues prompts under published versions of an adapter's weights.

    **Versions.** A version is a name and weights that never change. The caller gives a name to one
    content only, for ever: a server may outlive this process and still hold it. Training goes on
    beside it without touching it.

    **Jobs.** A job is active from ``submit`` until ``poll`` has returned its result or ``cancel``
    was called. What it samples depends on its prompt, its version and (seed, number of the
    sequence), not on what is sampled beside it: to the bit on a CPU, up to rounding elsewhere.

    **Threads.** One thread calls all verbs, that of the trainer. No verb but ``publish`` and
    ``poll`` takes long.

    **Failures.** A domain error (``TrainingError``) concerns one version or one job, and all else
    is as before. Any other exception means that this process's memory is suspect, and its worker
    ends. A server that is lost is neither: the sampler starts it again or waits for it, publishes
    to it what is published, and submits again the jobs that it had not finished. If it gives that
    up, ``poll`` returns an error for each of them.
    """

    @abstractmethod
    def report_progress(self, to: Callable[[], None]) -> None:
        """Have ``to`` called now and then while ``publish`` and ``poll`` compute or wait: the
        caller's sign of life, which no thread beside it could give."""

    @abstractmethod
    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        """Make weights available to jobs under a name.

        Publishing a version that is published, or retired but still in use, changes no weights, for
        by its name they are the same; it only is not retired any more. A sampler that works
        elsewhere may return before the version has arrived, and jobs of it wait for that.

        Args:
            version: See above.
            weights: What ``Trainer.capture_adapter`` returned, of which nothing is copied where the
                sampler shares the trainer's memory; or the directory of a checkpoint, of which only
                the weights are read, and memory is taken for nothing else.

        Raises:
            CheckpointNotFound: No such directory, or a checksum in it does not match.
            InvalidRequest: It was made for a base model of another shape.
            OutOfMemory: There is no room for it.
                After each of them the version is not published. A sampler that finds it out after
                it has returned answers the jobs of the version with that error.
        """

    @abstractmethod
    def retire(self, version: str) -> None:
        """Free a version as soon as no active job uses it; an unknown version does nothing.

        Jobs that were submitted before finish under its weights. New ones are refused.
        """

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, int]:
        """The versions that take memory, each with its number of active jobs: those published, and
        those retired that a job still uses."""

    @abstractmethod
    def submit(self, key: str, job: SampleJob) -> None:
        """Begin a job, or queue it where not all fit at once.

        Args:
            key: The caller's name for it, not that of an active job.
            job: See ``SampleJob``.

        Raises:
            InvalidRequest: The prompt is empty or out of vocabulary, a parameter has no meaning, or
                the version is not published.
            ContextLengthExceeded: The prompt leaves no room in the context.
            LimitExceeded: It asks for more than could ever run at one time.
                After each of them there is no such job.
        """

    @abstractmethod
    def poll(self, wait_seconds: float) -> dict[str, SampleOutput | TrainingError]:
        """The jobs that have finished since the last call, by key; each is returned once.

        Returns as soon as there is one, at once if no job is active, and otherwise when the time is
        up: with nothing, or with what has finished just then.

        A sampler that shares the trainer's base model samples only in here: at least one step (a
        token of each sequence, or a piece of a prompt), and further ones while there is time, so
        that a call may be late by one step. A sampler that works elsewhere only waits.
        """

    @abstractmethod
    def progress(self, key: str) -> list[str]:
        """The text of each of an active job's S sequences, as far as it will not change any more
        and as far as it is known here.

        Held back are bytes that are no character yet and whatever may still turn out to be the
        beginning of a stop string: each text is a beginning of the finished one.
        """

    @abstractmethod
    def cancel(self, key: str) -> int:
        """Forget a job: ``poll`` will not return it, and its sequences leave the batch.

        Returns:
            How many tokens had been sampled for it, as far as it is known here; 0 for a key that is
            not active.
        """

    @abstractmethod
    def release_memory(self) -> None:
        """Give back what no version and no active job uses. For a worker that is idle: what comes
        next may be slower once."""

    @property
    @abstractmethod
    def active(self) -> int:
        """How many jobs are active."""
