"""The loss functions' names, inputs and settings: the one table, for all who may not import torch.

The formulas are in ``training.engine.losses``, one function per name here. What a request may
bring is checked by the functions below, at submission by the web and again by the engine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from training.errors import InvalidDatum, InvalidRequest
from training.types import Conversation, Datum

CUSTOM = "custom"
"""The name under which an uploaded loss is asked for; it is in no table, its graph says it all."""

TARGET_TOKENS = "target_tokens"


@dataclass(frozen=True, kw_only=True)
class LossFnSpec:
    """What one loss function takes."""

    inputs: tuple[str, ...]
    """Names in ``loss_fn_inputs`` that every datum must have."""
    optional_inputs: tuple[str, ...] = ()
    """Names it may have beside them; each is also a setting, which it replaces per token."""
    config: Mapping[str, float | None] = field(default_factory=dict)
    """Names in ``loss_fn_config`` and their defaults; None means that it must be given."""
    allows_many_targets: bool = False
    """Whether ``target_tokens`` may be (N, K)."""
    is_elementwise: bool = True
    """Whether a token's loss depends on that token alone; if not, the whole datum is needed."""

    @property
    def float_inputs(self) -> tuple[str, ...]:
        """Every input but ``target_tokens``, the optional ones last."""
        return (*(n for n in self.inputs if n != TARGET_TOKENS), *self.optional_inputs)


_POLICY_INPUTS = (TARGET_TOKENS, "logprobs", "advantages")
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")

LOSS_FNS: Mapping[str, LossFnSpec] = {
    "cross_entropy": LossFnSpec(inputs=(TARGET_TOKENS, "weights"), allows_many_targets=True),
    "importance_sampling": LossFnSpec(inputs=_POLICY_INPUTS),
    "ppo": LossFnSpec(
        inputs=_POLICY_INPUTS,
        optional_inputs=_THRESHOLDS,
        config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
    "cispo": LossFnSpec(
        inputs=_POLICY_INPUTS,
        optional_inputs=_THRESHOLDS,
        config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    "dro": LossFnSpec(inputs=_POLICY_INPUTS, config={"beta": None}),
    "gspo": LossFnSpec(
        inputs=(*_POLICY_INPUTS, "sequence_ratio_mask"),
        optional_inputs=_THRESHOLDS,
        # Useful thresholds of a sequence's ratio lie much closer to 1 than a token's, and none
        # are documented: whoever asks must say them.
        config={"clip_low_threshold": None, "clip_high_threshold": None},
        is_elementwise=False,
    ),
}

_NOT_SERVED: Mapping[str, str] = {
    "stable_reinforce": "its formula is not public, so this server does not have it",
    CUSTOM: "it needs a loss that was uploaded, named by loss_fn_config.loss_id",
}


def find_loss_fn(loss_fn: str) -> LossFnSpec:
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


def complete_config(loss_fn: str, config: Mapping[str, float]) -> dict[str, float]:
    """Every setting of a built-in loss, defaults filled in.

    Raises:
        InvalidRequest: A setting is unknown, missing, not finite, or contradicts another. (400)
    """
    defaults = find_loss_fn(loss_fn).config
    for name, value in config.items():
        where = f"loss_fn_config.{name[:60]}"
        if name not in defaults:
            expected = ", ".join(defaults) or "no field"
            raise InvalidRequest(f"{where}: unknown for {loss_fn}; expected {expected}")
        if not math.isfinite(value):
            raise InvalidRequest(f"{where}: {value} is not finite")
    complete: dict[str, float] = {}
    for name, default in defaults.items():
        chosen = config.get(name, default)
        if chosen is None:
            raise InvalidRequest(f"loss_fn_config.{name}: this field is required for {loss_fn}")
        complete[name] = float(chosen)
    low, high = (complete.get(name) for name in _THRESHOLDS)
    if low is not None and high is not None and low > high:
        raise InvalidRequest(
            f"loss_fn_config.clip_low_threshold: {low} is above clip_high_threshold {high}"
        )
    return complete


def check_input_names(
    loss_fn: str, names: Collection[str], where: str, *, weights_optional: bool = False
) -> None:
    """Whether a datum brings what a built-in loss reads, and nothing that it would not read.

    Args:
        where: The datum, such as ``data[3]``.
        weights_optional: When evaluating, absent weights mean weights of 1.

    Raises:
        InvalidDatum: The message names the input. (400)
    """
    spec = find_loss_fn(loss_fn)
    takes = ", ".join((*spec.inputs, *(f"{name} (optional)" for name in spec.optional_inputs)))
    for name in names:
        if name not in spec.inputs and name not in spec.optional_inputs:
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name[:60]}: not an input of {loss_fn}; it takes {takes}"
            )
    for name in spec.inputs:
        if name not in names and not (weights_optional and name == "weights"):
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name}: missing, and {loss_fn} needs it; it takes {takes}"
            )


def check_loss(
    loss_fn: str, config: Mapping[str, float], data: Sequence[Conversation | Datum]
) -> None:
    """Whether the built-in loss exists and gets its settings and inputs, by name.

    Raises:
        InvalidRequest: The message names the field. (400)
        InvalidDatum: The message names the datum and the input. (400)
    """
    complete_config(loss_fn, config)
    for index, item in enumerate(data):
        if isinstance(item, Datum):
            check_input_names(loss_fn, item.loss_fn_inputs, f"data[{index}]")
        elif loss_fn != "cross_entropy":
            raise InvalidDatum(
                f"data[{index}]: {loss_fn} needs token-level datums with loss_fn_inputs "
                f"{', '.join(LOSS_FNS[loss_fn].inputs)}; a conversation works with cross_entropy "
                "only"
            )
