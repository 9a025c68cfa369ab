"""Checks a request's loss inputs and settings against one table (``loss_fns.LOSS_FNS``).

The service that accepts a request checks it, for all dialects; the engine checks again
the data that it computes, because these may come from an older version.

The rule for inputs, described for clients in ``losses.md``: every input that the loss needs must be
present. An input that it does not read is accepted and reported if its name is known and it can
have only one meaning. Any other input is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from training.errors import InvalidDatum, InvalidRequest
from training.loss_fns import (
    ADVANTAGES,
    LOSS_FNS,
    MASK,
    TOLERATED_INPUTS,
    WEIGHTS,
    LossSpec,
    find_loss_fn,
)
from training.types import Conversation, Example, LossFnInputs


def complete_config(loss_fn: str, config: Mapping[str, float]) -> dict[str, float]:
    """Every setting of a built-in loss, defaults filled in.

    Raises:
        InvalidRequest: A setting is unknown, missing, not finite, or contradicts another. (400)
    """
    known = find_loss_fn(loss_fn).config
    for name, value in config.items():
        where = f"loss_fn_config.{name[:60]}"
        if name not in known:
            expected = ", ".join(known) or "no field"
            raise InvalidRequest(f"{where}: unknown for {loss_fn}; expected {expected}")
        if not math.isfinite(value):
            raise InvalidRequest(f"{where}: {value} is not finite")
        if value < known[name].minimum:
            raise InvalidRequest(f"{where}: {value} is not at least {known[name].minimum:g}")
    complete: dict[str, float] = {}
    for name, setting in known.items():
        chosen = config.get(name, setting.default)
        if chosen is None:
            raise InvalidRequest(f"loss_fn_config.{name}: this field is required for {loss_fn}")
        complete[name] = float(chosen)
    low, high = (complete.get(f"clip_{end}_threshold") for end in ("low", "high"))
    if low is not None and high is not None and low > high:
        raise InvalidRequest(
            f"loss_fn_config.clip_low_threshold: {low} is above clip_high_threshold {high}"
        )
    return complete


def check_inputs(loss_fn: str, inputs: LossFnInputs, where: str, *, trains: bool) -> None:
    """Check that a datum has the inputs of a built-in loss, and no ambiguous further ones.

    Args:
        where: The datum, such as ``data[3]``.
        trains: Whether a gradient is computed.

    Raises:
        InvalidDatum: The message names the input. (400)
    """
    spec = find_loss_fn(loss_fn)
    takes = ", ".join((*spec.inputs, *(f"{name} (optional)" for name in spec.optional_inputs)))
    for name in inputs:
        if not spec.takes(name) and name not in TOLERATED_INPUTS:
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name[:60]}: not an input of {loss_fn}; it takes {takes}"
            )
    for name in spec.inputs:
        if name not in inputs:
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name}: missing, and {loss_fn} needs it; it takes {takes}"
            )
    for name in (WEIGHTS, MASK):
        if name in inputs and not spec.takes(name):
            _check_idle_factor(loss_fn, spec, name, inputs, f"{where}.loss_fn_inputs")
    if trains and spec.factor == WEIGHTS and WEIGHTS not in inputs and ADVANTAGES in inputs:
        raise InvalidDatum(
            f"{where}.loss_fn_inputs.{WEIGHTS}: missing, beside {ADVANTAGES} that {loss_fn} does "
            f"not read; send {WEIGHTS} to say which tokens are trained"
        )


def _check_idle_factor(
    loss_fn: str, spec: LossSpec, name: str, inputs: LossFnInputs, where: str
) -> None:
    """Refuse weights beside the loss's own factor, unless they would have no effect."""
    given = inputs[name]
    own = inputs.get(spec.factor, np.ones(given.shape, np.float32))
    if given.shape != own.shape:
        raise InvalidDatum(
            f"{where}.{name}: shape {list(given.shape)} for {spec.factor} of shape "
            f"{list(own.shape)}"
        )
    differs = (given != 1) & (own != 0)
    if differs.any():
        index = tuple(int(i) for i in np.argwhere(differs)[0])
        place = "".join(f"[{i}]" for i in index)
        raise InvalidDatum(
            f"{where}.{name}{place}: {given[index]:g}, and {loss_fn} does not read it; only 1 is "
            f"taken where {spec.factor} are not 0, so multiply {spec.factor} by it instead"
        )


def check_loss(
    loss_fn: str,
    config: Mapping[str, float],
    data: Sequence[Example],
    *,
    forward_only: bool,
    has_provenance: bool = False,
) -> None:
    """Check that the built-in loss exists and has valid settings and inputs.

    Args:
        has_provenance: The datums have the log-probabilities of recorded samples.

    Raises:
        InvalidRequest: The message names the field. (400)
        InvalidDatum: The message names the datum and the input. (400)
    """
    complete_config(loss_fn, config)
    spec = find_loss_fn(loss_fn)
    if spec.needs_provenance and not has_provenance:
        raise InvalidRequest(
            f"loss_fn: {loss_fn} needs the provenance of sampled tokens, which only the tinker "
            "SDK's forward_backward sends"
        )
    for index, item in enumerate(data):
        if not isinstance(item, Conversation):
            check_inputs(loss_fn, item.loss_fn_inputs, f"data[{index}]", trains=not forward_only)
        elif not spec.takes_text:
            takers = " and ".join(name for name, known in LOSS_FNS.items() if known.takes_text)
            raise InvalidDatum(
                f"data[{index}]: {loss_fn} needs token-level datums with loss_fn_inputs "
                f"{', '.join(spec.inputs)}; a conversation works with {takers} only"
            )
