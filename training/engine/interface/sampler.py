"""The sampler: prompts in, sequences out, many at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from training.errors import TrainingError
from training.types import PromptScores, SampledSequence, SamplingParams, ScoringParams


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleJob:
    """One sampling request: S sequences that continue one prompt."""

    prompt: Sequence[int]
    sampling_params: SamplingParams
    """``seed`` is set: whoever builds the job has chosen one."""
    num_samples: int = 1
    adapter_name: str | None = None
    """A resident adapter (its weights as they are when the job is admitted), or None for the
    base model."""
    prompt_logprobs: bool = False
    scoring: ScoringParams = field(default_factory=ScoringParams)
    """The log-probabilities that few ask for."""
    group: str = ""
    """Whom it is for: where not all jobs fit at once, groups share what there is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOutput:
    """A finished sampling job."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float] | None
    """One per prompt token when asked for; the first is NaN, since nothing precedes it."""
    scores: PromptScores = field(default_factory=PromptScores)
    """What else was asked of the prompt."""
    prompt_end: Sequence[int] = ()
    """The prompt's last tokens, after which ``Renderer.token_texts`` reads the sequences."""


class Sampler(ABC):
    """Continuous batching: jobs join and leave between steps; where not all fit at once, the rest
    wait (``SampleJob.group``).

    A job's text depends on its own prompt, weights and seed, not on what shares its steps.
    """

    @abstractmethod
    def admit(self, key: str, job: SampleJob) -> None:
        """Queue a job under the caller's key.

        The adapter's weights are those of this moment, however long the job takes: an
        optim_step that comes later does not touch them.

        Raises:
            InvalidRequest: The prompt is empty or out of vocabulary, or a parameter has no meaning.
            ContextLengthExceeded: The prompt leaves no room in the context.
            LimitExceeded: It asks for more than could ever run at one time.
        """

    @abstractmethod
    def step(self) -> dict[str, SampleOutput | TrainingError]:
        """Advance every active sequence by one token; return the jobs that finished, by key.

        A step may instead prefill a waiting prompt, so that no step takes long.
        """

    @abstractmethod
    def progress(self, key: str) -> list[str]:
        """The text of each sequence of an active job, as far as it will not change any more.

        Held back are bytes that are no character yet and whatever may still turn out to be the
        beginning of a stop string: each text is a beginning of the finished one.
        """

    @abstractmethod
    def cancel(self, key: str) -> int:
        """Forget a job; its sequences leave the batch before the next step.

        Returns:
            How many tokens had been sampled for it; 0 for a key that is not active.
        """

    @property
    @abstractmethod
    def active(self) -> int:
        """How many jobs are admitted and not finished."""
