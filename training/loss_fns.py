"""The loss functions' names, inputs and settings: the one table, for all who may not import torch.

Parsers, the worker and the engine read it. The formulas are in
``training.engine.torch.losses``, one function per name here; what a request may bring is checked
by ``training.loss_checks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.errors import InvalidRequest
from training.types import MAX_FLOAT32

DEFAULT_LOSS_FN = "cross_entropy"

CUSTOM = "custom"
"""The name under which an uploaded loss is asked for; it is in no table, its graph says it all."""

STABLE_REINFORCE = "stable_reinforce"
"""The hosted service's name. Its formula is not public; this one is our own."""

TARGET_TOKENS = "target_tokens"
WEIGHTS = "weights"
ADVANTAGES = "advantages"
MASK = "mask"
"""What client libraries keep beside the inputs of a loss; no loss reads it."""


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
    """What one loss function takes, and how its sum is made a mean for people."""

    inputs: tuple[str, ...]
    """Names in ``loss_fn_inputs`` that every datum must have."""
    optional_inputs: tuple[str, ...] = ()
    """Names it may have beside them. Where ``weights`` are absent they are 1; any other is also a
    setting, which it replaces per token."""
    factor: str
    """The input by which a token counts, ``weights`` or ``advantages``: a token is trained where it
    is not 0."""
    config: Mapping[str, Setting] = field(default_factory=dict)
    """What ``loss_fn_config`` may hold."""
    mean_is_weighted: bool = False
    """Whether the mean that people read is over the sum of the factor, where that is positive. If
    not, it is per trained token."""
    takes_text: bool = False
    """Whether conversations can be trained with it: all that it reads follows from the text."""
    allows_many_targets: bool = False
    """Whether ``target_tokens`` may be (N, K)."""
    is_elementwise: bool = True
    """Whether a token's loss depends on that token alone; if not, the whole datum is needed."""
    needs_provenance: bool = False
    """Whether the datum must say from which recorded samples its tokens come. ``logprobs`` are
    then the recorded ones, put in when the request is accepted (``training.provenance``)."""

    @property
    def float_inputs(self) -> tuple[str, ...]:
        """Every input but ``target_tokens``, the optional ones last."""
        return (*(n for n in self.inputs if n != TARGET_TOKENS), *self.optional_inputs)

    def takes(self, name: str) -> bool:
        """Whether the loss reads an input of this name."""
        return name in self.inputs or name in self.optional_inputs


_POLICY_INPUTS = (TARGET_TOKENS, "logprobs", ADVANTAGES)
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")


def _thresholds(low: float | None, high: float | None) -> Mapping[str, Setting]:
    return dict(zip(_THRESHOLDS, (Setting(default=low), Setting(default=high)), strict=True))


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
        optional_inputs=_THRESHOLDS,
        factor=ADVANTAGES,
        config=_thresholds(0.8, 1.2),
    ),
    "cispo": LossSpec(
        inputs=_POLICY_INPUTS,
        optional_inputs=_THRESHOLDS,
        factor=ADVANTAGES,
        config=_thresholds(0.0, 4.0),
    ),
    "dro": LossSpec(
        inputs=_POLICY_INPUTS, factor=ADVANTAGES, config={"beta": Setting(default=None)}
    ),
    "gspo": LossSpec(
        inputs=(*_POLICY_INPUTS, "sequence_ratio_mask"),
        optional_inputs=_THRESHOLDS,
        factor=ADVANTAGES,
        # Useful thresholds of a sequence's ratio lie much closer to 1 than a token's, and none
        # are documented: whoever asks must say them.
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
"""What a loss takes also where it does not read it, if it has one meaning. Any other name that a
loss does not read is refused."""

_NOT_SERVED: Mapping[str, str] = {
    CUSTOM: "it needs a loss that was uploaded, named by loss_fn_config.loss_id",
}


def find_loss_fn(loss_fn: str) -> LossSpec:
    """The built-in loss of this name.

    Raises:
        InvalidRequest: There is none; the message lists those there are. (400)
    """
    if loss_fn in LOSS_FNS:
        return LOSS_FNS[loss_fn]
    known = ", ".join(LOSS_FNS)
    if loss_fn in _NOT_SERVED:
        raise InvalidRequest(f"loss_fn: {loss_fn}: {_NOT_SERVED[loss_fn]}; there are {known}")
    raise InvalidRequest(f"loss_fn: expected one of {known}; got {loss_fn[:60]!r}")
