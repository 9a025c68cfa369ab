"""The loss functions' names, inputs and settings in one table, without torch.

Parsers, the worker and the engine read it. The formulas are in
``training.engine.torch.losses``, one function per name here; requests are checked
by ``training.loss_checks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.errors import InvalidRequest
from training.types import MAX_FLOAT32

DEFAULT_LOSS_FN = "cross_entropy"

CUSTOM = "custom"
"""The name for an uploaded loss; it is not in the table, because its graph defines it."""

STABLE_REINFORCE = "stable_reinforce"
"""The hosted service's name. Its formula is not public; this one is our own."""

TARGET_TOKENS = "target_tokens"
WEIGHTS = "weights"
ADVANTAGES = "advantages"
LOGPROBS = "logprobs"
"""The sampler's log-probabilities of the targets."""
THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
MASK = "mask"
"""An array that client libraries keep beside a loss's inputs; no loss reads it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One name in ``loss_fn_config``."""

    default: float | None
    """None means that it must be given."""
    minimum: float = -MAX_FLOAT32
    may_be_text: bool = False
    """Whether clients also send the number as text."""


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The inputs and settings of one loss function, and how its mean is computed."""

    inputs: tuple[str, ...]
    """Names in ``loss_fn_inputs`` that every datum must have."""
    optional_inputs: tuple[str, ...] = ()
    """Names that it may also have. Absent ``weights`` are 1; any other is also a
    setting, which it replaces per token."""
    factor: str
    """The input that multiplies a token's loss, ``weights`` or ``advantages``: a token is trained
    if it is not 0."""
    config: Mapping[str, Setting] = field(default_factory=dict)
    """The allowed settings in ``loss_fn_config``."""
    mean_is_weighted: bool = False
    """Whether the reported mean is over the sum of the factor, if that is positive. If
    not, it is per trained token."""
    takes_text: bool = False
    """Whether conversations can be trained with it, because all its inputs follow from the text."""
    allows_many_targets: bool = False
    """Whether ``target_tokens`` may be (N, K)."""
    is_elementwise: bool = True
    """Whether a token's loss depends on that token alone; if not, the whole datum is needed."""
    needs_provenance: bool = False
    """Whether a datum must name the recorded samples of its tokens. ``logprobs`` are
    then the recorded ones, inserted when the request is accepted (``training.provenance``)."""

    def __post_init__(self) -> None:
        for name in self.optional_inputs:
            if name != WEIGHTS and name not in self.config:
                raise ValueError(f"{name}: an optional input must be a setting too, or weights")

    @property
    def float_inputs(self) -> tuple[str, ...]:
        """Every input but ``target_tokens``, the optional ones last."""
        return (*(n for n in self.inputs if n != TARGET_TOKENS), *self.optional_inputs)

    @property
    def has_thresholds(self) -> bool:
        """Whether it clips between two thresholds, given as settings or per token."""
        return all(name in self.config for name in THRESHOLDS)

    def takes(self, name: str) -> bool:
        """Whether the loss reads an input of this name."""
        return name in self.inputs or name in self.optional_inputs


_POLICY_INPUTS = (TARGET_TOKENS, LOGPROBS, ADVANTAGES)


def _thresholds(low: float | None, high: float | None) -> Mapping[str, Setting]:
    return dict(zip(THRESHOLDS, (Setting(default=low), Setting(default=high)), strict=True))


LOSS_FNS: Mapping[str, LossSpec] = {
    DEFAULT_LOSS_FN: LossSpec(
        inputs=(TARGET_TOKENS,),
        optional_inputs=(WEIGHTS,),
        factor=WEIGHTS,
        mean_is_weighted=True,
        takes_text=True,
        allows_many_targets=True,
    ),
    "importance_sampling": LossSpec(inputs=_POLICY_INPUTS, factor=ADVANTAGES),
    "ppo": LossSpec(
        inputs=_POLICY_INPUTS,
        optional_inputs=THRESHOLDS,
        factor=ADVANTAGES,
        config=_thresholds(0.8, 1.2),
    ),
    "cispo": LossSpec(
        inputs=_POLICY_INPUTS,
        optional_inputs=THRESHOLDS,
        factor=ADVANTAGES,
        config=_thresholds(0.0, 4.0),
    ),
    "dro": LossSpec(
        inputs=_POLICY_INPUTS, factor=ADVANTAGES, config={"beta": Setting(default=None)}
    ),
    "gspo": LossSpec(
        inputs=(*_POLICY_INPUTS, "sequence_ratio_mask"),
        optional_inputs=THRESHOLDS,
        factor=ADVANTAGES,
        # Useful thresholds of a sequence's ratio are much closer to 1 than a token's, and none
        # are documented, so they are required.
        config=_thresholds(None, None),
        is_elementwise=False,
    ),
    STABLE_REINFORCE: LossSpec(
        inputs=_POLICY_INPUTS,
        factor=ADVANTAGES,
        config={"kl_coeff": Setting(default=0.01, minimum=0.0, may_be_text=True)},
        needs_provenance=True,
    ),
}

FLOAT_INPUTS = frozenset(name for spec in LOSS_FNS.values() for name in spec.float_inputs)
"""Every input but ``target_tokens`` that some loss reads: a float32 for each target."""

TOLERATED_INPUTS = FLOAT_INPUTS | {MASK}
"""Inputs that a loss accepts without reading them, if unambiguous. Any other name that a
loss does not read is refused."""

_NOT_SERVED: Mapping[str, str] = {
    CUSTOM: "it needs a loss that was uploaded, named by loss_fn_config.loss_id",
}


def find_loss_fn(loss_fn: str) -> LossSpec:
    """The built-in loss of this name.

    Raises:
        InvalidRequest: It does not exist; the message lists the known ones. (400)
    """
    if loss_fn in LOSS_FNS:
        return LOSS_FNS[loss_fn]
    known = ", ".join(LOSS_FNS)
    if loss_fn in _NOT_SERVED:
        raise InvalidRequest(f"loss_fn: {loss_fn}: {_NOT_SERVED[loss_fn]}; known are {known}")
    raise InvalidRequest(f"loss_fn: expected one of {known}; got {loss_fn[:60]!r}")


def takes_advantages(loss_fn: str) -> bool:
    """Whether the loss may be a policy gradient: it has advantages, or is a client's own."""
    spec = LOSS_FNS.get(loss_fn)
    return spec is None or spec.factor == ADVANTAGES
