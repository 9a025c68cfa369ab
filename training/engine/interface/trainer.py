"""The trainer: adapters, and the verbs that change them or compute with their gradients.

It is plain synchronous code for one thread; it never logs, never reads the clock, the environment
or a database.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.custom_loss_graph import CustomLossGraph
from training.engine.interface.values import BaseModelInfo, CapturedAdapter
from training.errors import TrainingError
from training.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepOutput,
)


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


class Trainer(ABC):
    """One base model and the adapters that are in its memory."""

    info: BaseModelInfo

    @abstractmethod
    def report_progress(self, to: Callable[[], None]) -> None:
        """Have ``to`` called every now and then while a verb takes long.

        It says that the computation moves, which no thread beside it could know. An trainer
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
    def adapter_bytes(self, config: LoraConfig, *, with_optimizer: bool = True) -> int:
        """Memory that an adapter of this shape takes: weights in float32 and in the base model's
        dtype, gradient and both Adam moments; without ``with_optimizer`` the weights only, as a
        sampler in this process keeps them.

        Raises:
            InvalidRequest: ``target_modules`` matches nothing.
        """

    @abstractmethod
    def release_memory(self) -> None:
        """Give back what nothing uses now and was kept to be used again. For a worker that is idle:
        what comes next may be slower once."""

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
    def prepare_custom_losses(self) -> bool:
        """Whether a pass with a client's own loss can begin at once.

        If not, what computes such losses is being started, and other work can go on until this
        returns True. A pass that does not ask first waits for it.
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
    def capture_adapter(self, adapter_name: str, *, with_optimizer: bool = True) -> CapturedAdapter:
        """The adapter as it is now: weights, Adam moments, accumulated gradient and step.

        Without ``with_optimizer`` the weights only: enough to sample from, and to be written into a
        directory that ``load_adapter`` takes with ``with_optimizer=False``. Taking it is quick.
        """

    def save_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        """Capture the adapter and write it at once; see ``capture_adapter``."""
        return self.capture_adapter(adapter_name, with_optimizer=with_optimizer).write(directory)

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
        ``"step"``: what two trainers compare to say that an adapter is the same."""
