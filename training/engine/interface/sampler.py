"""The sampler: prompts in, sequences out, many at a time, under versions of weights that do not
change.

It may compute in this process, beside the trainer and on the same base model, or use a separate
server. Callers see no difference: they publish versions, submit jobs that name them, and poll.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.engine.interface.values import CapturedAdapter
from training.errors import TrainingError
from training.images import PlacedImage
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
    """(T,), the tokens that stand for an image included."""
    sampling_params: SamplingParams
    """``seed`` must be set by the caller."""
    num_samples: int = 1
    """S."""
    version: str | None = None
    """A published version of an adapter's weights, or None for the base model."""
    prompt_logprobs: bool = False
    scoring: ScoringParams = field(default_factory=ScoringParams)
    """Further log-probabilities, which are rarely requested."""
    images: tuple[PlacedImage, ...] = ()
    """The images among the prompt's tokens, in order."""
    group: str = ""
    """The job's user: if not all jobs fit at once, groups share the room."""
    is_followed: bool = False
    """Whether ``progress`` will be asked for text. Otherwise a sampler that works elsewhere may
    know nothing of it before its end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOutput:
    """A finished sampling job."""

    sequences: list[SampledSequence]
    """S of them, in the order of their numbers; log-probabilities in nats, in float32."""
    prompt_logprobs: list[float] | None
    """One per prompt token when asked for; the first is NaN, since nothing precedes it."""
    scores: PromptScores = field(default_factory=PromptScores)
    """The other requested scores of the prompt."""
    cached_prompt_tokens: int = 0
    """The first tokens of the prompt that were not read, because an earlier job's keys and values
    of them were there."""
    prompt_end: Sequence[int] = ()
    """The prompt's last tokens, after which ``Renderer.token_texts`` reads the sequences."""


class Sampler(ABC):
    """Continues prompts under published versions of an adapter's weights.

    **Versions.** A version is a name and weights that never change. The caller gives a name to one
    content only, permanently: a server may outlive this process and still have it. Training
    continues without affecting it.

    **Jobs.** A job is active from ``submit`` until ``poll`` has returned its result or ``cancel``
    was called. Its tokens depend on its prompt, its version and (seed, number of the
    sequence), not on its batch-mates: to the bit on a CPU, up to rounding elsewhere.

    **Threads.** The trainer's thread makes all calls. Only ``publish`` and
    ``poll`` may take long.

    **Failures.** A domain error (``TrainingError``) concerns one version or one job; everything
    else is unchanged. Any other exception means that this process's memory may be corrupt, and the
    worker ends. A lost server is neither: the sampler restarts it or waits for it, publishes the
    versions to it again, and submits its unfinished jobs again. If it gives up, ``poll`` returns an
    error for each of them.
    """

    @abstractmethod
    def report_progress(self, to: Callable[[], None]) -> None:
        """Call ``to`` regularly while ``publish`` and ``poll`` compute or wait. It reports
        the caller's progress, which another thread could not know."""

    @abstractmethod
    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        """Make weights available to jobs under a name.

        Publishing a version that is published, or retired but still in use, loads nothing, because
        the name stands for the same weights; it only stops being retired. A sampler that runs
        elsewhere may return before the version has arrived; its jobs then wait for that.

        Args:
            version: See above.
            weights: The result of ``Trainer.capture_adapter``, which is not copied if the
                sampler shares the trainer's memory; or the directory of a checkpoint, from which
                only the weights are read into memory.

        Raises:
            CheckpointNotFound: No such directory, or a checksum in it does not match.
            InvalidRequest: It was made for a base model of another shape.
            OutOfMemory: There is not enough memory for it.
                After each of these the version is not published. A sampler that fails only after
                it has returned answers the jobs of the version with that error.
        """

    @abstractmethod
    def retire(self, version: str) -> None:
        """Free a version as soon as no active job uses it; an unknown version does nothing.

        Jobs that were submitted before finish with its weights. New ones are refused.
        """

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, int]:
        """The versions that take memory, each with its number of active jobs: those published, and
        those retired that a job still uses."""

    @abstractmethod
    def submit(self, key: str, job: SampleJob) -> None:
        """Start a job, or queue it if not all fit at once.

        Args:
            key: The caller's name for it, different from those of active jobs.
            job: See ``SampleJob``.

        Raises:
            InvalidRequest: The prompt is empty or out of vocabulary, a parameter has no meaning, or
                the version is not published.
            ContextLengthExceeded: The prompt leaves no room in the context.
            LimitExceeded: It needs more than can ever run at one time.
                After each of these the job does not exist.
        """

    @abstractmethod
    def poll(self, wait_seconds: float) -> dict[str, SampleOutput | TrainingError]:
        """The jobs that have finished since the last call, by key; each is returned once.

        Returns as soon as there is one, at once if no job is active, and otherwise when the time is
        up: with nothing, or with the jobs that finished just then.

        A sampler that shares the trainer's base model samples only in here: at least one step (a
        token of each sequence, or a piece of a prompt), and further ones while there is time, so
        that a call may be late by one step. A sampler that works elsewhere only waits.
        """

    @abstractmethod
    def progress(self, key: str) -> list[str]:
        """The text of each of an active job's S sequences, as far as it will not change any more
        and is known here.

        Incomplete characters are held back, and so is text that may still become the
        beginning of a stop string: each text is a beginning of the finished one.
        """

    @abstractmethod
    def cancel(self, key: str) -> int:
        """Forget a job: ``poll`` will not return it, and its sequences leave the batch.

        Returns:
            The number of tokens sampled for it, as far as known here; 0 for a key that is
            not active.
        """

    @abstractmethod
    def release_memory(self) -> None:
        """Free memory that no version and no active job uses. For an idle worker: the next job
        may be slower once."""

    @property
    def needs_turns(self) -> bool:
        """Whether it samples only in ``poll``, so that the caller must give it time beside its own
        work. One that works elsewhere answers False."""
        return True

    @property
    @abstractmethod
    def active(self) -> int:
        """The number of active jobs."""

    def figures(self) -> Mapping[str, Any]:
        """What the worker reports of it, in plain values; quick."""
        return {}

    def close(self) -> None:  # noqa: B027  # a sampler in this process has nothing to end
        """End what it has started. No other call follows."""
