"""The base class of all kinds of requests, for the web process and the worker.

Inside a lane, futures run in the order of their seq ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum, StrEnum, auto
from typing import Any, ClassVar, Self

from futures.payload import EncodedPayload, Packer
from training.errors import TrainingError
from training.payloads import Payload


class Kind(StrEnum):
    """``Future.kind``."""

    CREATE_RUN = "create_run"
    REMOVE_RUN = "remove_run"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAMPLE = "sample"
    SAVE_WEIGHTS = "save_weights"
    LOAD_WEIGHTS = "load_weights"
    COMPARE_RUNS = "compare_runs"
    CREATE_CUSTOM_LOSS = "create_custom_loss"


class Order(Enum):
    """How a request is ordered relative to others of its lane."""

    PASS = auto()
    """Only reads the weights, and shares a pass over the base model with others."""
    SAMPLE = auto()
    """Only reads the weights, and is sampled while other lanes continue."""
    BARRIER = auto()
    """Runs alone in its lane: after all earlier and before all later requests."""


class Request(ABC):
    """One request of a kind, as plain values."""

    kind: ClassVar[Kind]
    order: ClassVar[Order] = Order.BARRIER
    is_logged: ClassVar[bool] = False
    """Whether it changes its run's state, so that replaying it in its order rebuilds the run."""
    logged_errors: ClassVar[tuple[type[TrainingError], ...]] = ()
    """Errors of it that changed the state too, and are replayed."""
    is_interruptible: ClassVar[bool] = False
    """Whether its owner may cancel it while it runs: it changes nothing but its own result."""

    @abstractmethod
    def to_payload(self) -> Payload:
        """The values that the future stores.

        Its digest distinguishes a repeated request from a reused number. Equal requests must have
        equal payloads in all versions, so an option of a later version is stored only if it is
        used.
        """

    def encoded(self) -> EncodedPayload:
        """``to_payload()`` as bytes, with its digest."""
        return Packer().pack(self.to_payload()).encoded(self.kind)

    @classmethod
    @abstractmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """The request from a stored payload, of this version or an older one."""

    @property
    def cost(self) -> int:
        """Tokens to compute, estimated for text; the unit of a batch's size."""
        return 1

    @property
    def most_tokens(self) -> int:
        """The tokens that it may use of its owner's daily quota, estimated for text."""
        return 0

    @property
    def has_text(self) -> bool:
        """Whether the worker must make tokens of text or images before the request can run."""
        return False

    @property
    def summary(self) -> dict[str, Any]:
        """A few facts for lists and charts."""
        return {}
