"""The trainer: adapters, and the operations that change them or compute their gradients.

It is plain synchronous code for one thread; it never logs and never reads the clock, the
environment or a database.
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
    """True computes the same numbers and leaves the accumulated gradient unchanged."""
    custom_loss: CustomLossGraph | None = None
    """The graph of ``loss_fn="custom"``; None for other losses."""
    is_replay: bool = False
    """True if it was computed before: the limits of its custom loss are then less strict."""


class Trainer(ABC):
    """One base model and its resident adapters.

    **Threads.** One thread calls all operations, and each is finished when it returns. Another
    thread may meanwhile write what ``capture_adapter`` returned.

    **Failures.** After a domain error (``TrainingError``) the adapter is as before, unless the
    operation's documentation says otherwise. After any other exception the worker must end.
    """

    info: BaseModelInfo

    @abstractmethod
    def report_progress(self, to: Callable[[], None]) -> None:
        """Call ``to`` regularly while an operation runs.

        It reports that the computation makes progress, which another thread could not know. A
        trainer with only fast operations need not call it.
        """

    @abstractmethod
    def use_threads(self, count: int) -> None:
        """Compute with up to so many threads, the sampler of this process too.

        No result depends on it, so it may be called while an operation reports progress. A trainer
        whose threads are fixed ignores it.
        """

    @abstractmethod
    def create_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Make a resident adapter: A random by seed and module, B zero, no gradient, step 0.

        Raises:
            InvalidRequest: The name is taken, or ``target_modules`` matches nothing.
            OutOfMemory: Not enough memory for it.
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

    def device_memory(self) -> tuple[int, int] | None:
        """Bytes of the device's own memory that are taken, by any process, and all of them; None
        for a device without its own, as a CPU."""
        return None

    @abstractmethod
    def release_memory(self) -> None:
        """Free cached memory that is not in use. For an idle worker:
        the next operation may be slower once."""

    @abstractmethod
    def forward_backward(
        self, jobs: Sequence[ForwardBackwardJob]
    ) -> list[ForwardBackwardOutput | TrainingError]:
        """Run many requests, of many adapters, in few packed passes over the base model.

        Each job's gradient (that of the SUM of its loss) is added to its adapter's accumulated
        gradient. A bad job gets its error at its position in the list and adds nothing; its
        batch-mates are not affected.

        Returns:
            One entry per job, in order.
        """

    @abstractmethod
    def prepare_custom_losses(self) -> bool:
        """Whether a pass with a client's own loss can begin at once.

        If not, the process for such losses is being started, and other work can continue until this
        returns True. A pass without this check waits for it.
        """

    @abstractmethod
    def optim_step(self, adapter_name: str, adam_params: AdamParams) -> OptimStepOutput:
        """Apply the accumulated gradient with AdamW and clear it.

        Without any gradient since the last step, the gradient is zero: weight decay and
        momentum still act, as in torch.optim.AdamW.

        Raises:
            GradientDropped: The gradient is too large; it is cleared, so that the next good batch
                can be stepped. Weights, moments and step are unchanged.
            NonFiniteResult: The new weights would not be finite.
            OutOfMemory: Not enough memory for the new weights and moments.
                After either, weights, moments, step and gradient are unchanged.
        """

    @abstractmethod
    def drop_gradient(self, adapter_name: str) -> None:
        """Clear the accumulated gradient, as a step that raised GradientDropped did."""

    @abstractmethod
    def capture_adapter(self, adapter_name: str, *, with_optimizer: bool = True) -> CapturedAdapter:
        """The adapter's current state: weights, Adam moments, accumulated gradient and step.

        Without ``with_optimizer`` only the weights: enough for sampling, and for a
        directory that ``load_adapter`` takes with ``with_optimizer=False``. The call is quick.
        """

    def save_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        """Capture the adapter and write it at once; see ``capture_adapter``."""
        return self.capture_adapter(adapter_name, with_optimizer=with_optimizer).write(directory)

    @abstractmethod
    def load_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        """Load the directory into ``adapter_name``, which need not be resident before.

        Args:
            with_optimizer: False loads only the weights: moments, gradient and step are zero.

        Returns:
            The optimizer steps that the adapter has taken.

        Raises:
            CheckpointNotFound: No such directory, or a checksum in it does not match.
            InvalidRequest: It was made for a base model of another shape.
            OutOfMemory: Not enough memory for it; resident adapters are unchanged.
        """

    @abstractmethod
    def import_adapter(self, adapter_name: str, directory: Path) -> LoraConfig:
        """Make a resident adapter of files in peft's format: its function, step 0, no moments.

        Returns:
            Its shape, with the train_ flags if they select the same modules. The seed is 0.

        Raises:
            CheckpointNotFound: No such directory.
            InvalidRequest: The name is taken, or it is no LoRA adapter of this base model; the
                message names the file and the field or tensor.
            OutOfMemory: Not enough memory for it; resident adapters are unchanged.
        """

    @abstractmethod
    def save_peft(self, adapter_name: str, directory: Path) -> int:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in peft's format."""

    @abstractmethod
    def adapter_state(self, adapter_name: str) -> dict[str, Any]:
        """``{"weights", "exp_avg", "exp_avg_sq", "grad"}`` as flat float32 numpy arrays, and
        ``"step"``: for comparing an adapter between two trainers."""
