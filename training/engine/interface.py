"""The contract between the worker and whatever computes: verbs, plain values, no Django.

An engine holds one frozen base model and any number of adapters. It is plain synchronous
code for one thread; it never logs, never reads the clock, the environment or a database.

Errors come in two sorts. A domain error (``training.errors.TrainingError``) says that one
request was refused and that the adapter is exactly as it was before. Any other exception
means that memory is suspect: the worker must throw the engine away and rebuild its adapters
from their logs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.custom_loss_graph import CustomLossGraph
from training.errors import TrainingError
from training.types import (
    NO_CHAT_OPTIONS,
    AdamParams,
    ChatOptions,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepOutput,
    PromptScores,
    SampledSequence,
    SamplingParams,
    ScoringParams,
    TokenText,
)


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """What a client may know about the base model."""

    name: str
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    device: str
    dtype: str
    conversation_fault: str | None = None
    """Why no conversation can be trained on; None if they can be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardJob:
    """One request's share of a pass over the base model."""

    adapter_name: str
    data: Sequence[Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, float] = field(default_factory=dict)
    forward_only: bool = False
    """True computes the same numbers and leaves the accumulated gradient alone."""
    custom_loss: CustomLossGraph | None = None
    """What ``loss_fn="custom"`` means; None for the others."""
    is_replay: bool = False
    """True if it was computed before: what its custom loss may use is not measured as strictly."""


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
    """The prompt's last tokens, after which ``Engine.token_texts`` reads the sequences."""


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


class Engine(ABC):
    """One base model, its resident adapters and the verbs of the API."""

    info: BaseModelInfo
    sampler: Sampler
    text: Any = None
    """What has ``render_conversation``, ``render_prompt`` and ``encode`` of this engine and can be
    copied into another process, where a text that takes long holds up nobody; None if the
    engine's own verbs take no time."""

    @abstractmethod
    def report_progress(self, to: Callable[[], None]) -> None:
        """Have ``to`` called every now and then while a verb takes long.

        It says that the computation moves, which no thread beside it could know. An engine
        whose verbs take no time need not.
        """

    @abstractmethod
    def create_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Make a resident adapter: A seeded per module, B zero, no gradient, step 0.

        Raises:
            InvalidRequest: The name is taken, or ``target_modules`` matches nothing.
            OutOfMemory: No room for it.
        """

    @abstractmethod
    def drop_adapter(self, adapter_name: str) -> None:
        """Free an adapter's memory. Dropping an unknown name does nothing."""

    @abstractmethod
    def adapter_names(self) -> list[str]:
        """Resident adapters, the least recently used first."""

    @abstractmethod
    def adapter_bytes(self, adapter_name: str) -> int:
        """Memory an adapter holds: weights, gradient and both Adam moments."""

    @abstractmethod
    def forward_backward(
        self, jobs: Sequence[ForwardBackwardJob]
    ) -> list[ForwardBackwardOutput | TrainingError]:
        """Run many requests, of many adapters, as few packed passes over the base model.

        Each job's gradient (that of the SUM of its loss) is added to its adapter's accumulated
        gradient. A bad job gets its error in its place in the list and adds nothing; its
        batch-mates are as if it had not been there.

        Returns:
            One entry per job, in order.
        """

    @abstractmethod
    def optim_step(self, adapter_name: str, adam_params: AdamParams) -> OptimStepOutput:
        """Apply the accumulated gradient with AdamW and clear it.

        Without any gradient since the last step, the gradient is zero: weight decay and
        momentum still act, as in torch.optim.AdamW.

        Raises:
            GradientDropped: The gradient is too large; it is cleared, so that the next good batch
                can be stepped. Weights, moments and step are as before.
            NonFiniteResult: The new weights would not be finite.
            OutOfMemory: No room for the new weights and moments.
                After either, weights, moments, step and gradient are as before.
        """

    @abstractmethod
    def drop_gradient(self, adapter_name: str) -> None:
        """Clear the accumulated gradient, as a step that raised GradientDropped did."""

    @abstractmethod
    def capture_adapter(
        self, adapter_name: str, *, with_optimizer: bool = True
    ) -> Callable[[Path], int]:
        """The adapter as it is now, as a function that writes it into a new directory.

        Taking it is quick; the function may be called later and from another thread, while the
        adapter trains on, and writes weights, Adam moments, accumulated gradient and step of
        the moment of capture. Without ``with_optimizer`` the weights only: enough to sample
        from, and a directory that ``load_adapter`` takes with ``with_optimizer=False``.

        Written beside it, fsynced, then renamed, so that the directory is whole or absent.
        ``meta.json`` in it can be read by eye and carries a checksum of every file.

        Returns:
            A function that returns the bytes written. It raises StorageFull or StorageFailed, and
            then nothing is left behind.
        """

    def save_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        """Capture the adapter and write it at once; see ``capture_adapter``."""
        return self.capture_adapter(adapter_name, with_optimizer=with_optimizer)(directory)

    @abstractmethod
    def load_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> None:
        """Make ``adapter_name`` what the directory says; it need not be resident before.

        Args:
            with_optimizer: False loads the weights only: moments, gradient and step are zero.

        Raises:
            CheckpointNotFound: No such directory, or a checksum in it does not match.
            InvalidRequest: It was made for a base model of another shape.
            OutOfMemory: No room for it; what was resident is as before.
        """

    @abstractmethod
    def save_peft(self, adapter_name: str, directory: Path) -> int:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them."""

    @abstractmethod
    def adapter_state(self, adapter_name: str) -> dict[str, Any]:
        """``{"weights", "exp_avg", "exp_avg_sq", "grad"}`` as flat float32 numpy arrays, and
        ``"step"``: what two engines compare to say that an adapter is the same."""

    @abstractmethod
    def render_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        """One conversation as a datum for cross_entropy, shifted by one token.

        The model's own chat template turns it into T tokens; the datum has T - 1 positions.
        ``train_on``: ``assistant`` gives weight 1 to what follows each prompt that ends where the
        assistant speaks, up to the token on which sampling stops; ``all`` to the text and end
        of turn of every other message given as well; ``auto`` is ``assistant`` if there is an
        assistant turn and ``all`` otherwise.

        Raises:
            InvalidRequest: ``assistant`` was asked for and there is no assistant turn, or what
                would be trained is not what would be sampled.
        """

    def render_by_first_rules(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str
    ) -> Datum:
        """A conversation of roles and texts as the first version made it a datum, for replays of
        what that accepted."""
        return self.render_conversation(messages, train_on=train_on)

    @abstractmethod
    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        """A conversation as a prompt that ends where the assistant begins to speak."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text as the token ids of a prompt, without a chat template, beginning as the model's
        tokenizer begins every text."""

    @abstractmethod
    def token_texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        """Each sampled token by itself, special tokens written out, and where it begins in the
        sequence's text.

        Args:
            before: What the tokens were sampled after.
        """

    @abstractmethod
    def prompt_texts(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        """A prompt's text, special tokens written out, and each token's place in it.

        Args:
            text: What the tokens were made of, if it was text; it comes back as it was.
        """
