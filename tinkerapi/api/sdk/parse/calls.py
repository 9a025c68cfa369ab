"""The values of a ``forward_backward``, and the checks that its protobuf and JSON forms share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.field import Integer, Number, Text
from training.errors import InvalidDatum, LimitExceeded
from training.loss_fns import CUSTOM, DEFAULT_LOSS_FN, LOSS_FNS
from training.payloads import with_weights_of_one
from training.types import MAX_FLOAT32, Datum, ImageDatum, Provenance

_MODEL_ID = Text(description="The run.")
_SEQ_ID = Integer(description="Its place in the run.", minimum=1, maximum=2**31 - 1)
_LOSS_FN = Text(description="The loss function's name.")
_SETTING = Number(description="A setting of the loss.", minimum=-MAX_FLOAT32)
_LOSS_ID = Text(description="An uploaded loss.")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardCall:
    """The values of one ``forward_backward`` or ``forward``."""

    model_id: str
    seq_id: int
    """Its place in the run's order, from 1."""
    data: list[Datum | ImageDatum]
    loss_fn: str
    """As sent; checked against the table of losses."""
    loss_fn_config: dict[str, float]
    loss_id: str | None
    """The uploaded loss that ``loss_fn="custom"`` means; None for the others."""
    forward_only: bool
    """True computes loss and outputs and leaves the gradients untouched."""
    provenance: list[Provenance | None] = field(default_factory=list)
    """The provenance of each datum's tokens, for a loss that reads it; else empty."""

    def data_to_store(self) -> list[Datum | ImageDatum]:
        """The data as the first version stored them, so that a request of that time has the same
        digest when it is sent again: a forward without weights has weights of 1."""
        if self.forward_only and self.loss_fn == DEFAULT_LOSS_FN:
            return with_weights_of_one(self.data)
        return self.data


def check_ids(model_id: Any, seq_id: Any) -> tuple[str, int]:
    """The run's id and the request's number.

    Raises:
        InvalidRequest: One of them is invalid. (400)
    """
    return _MODEL_ID.check(model_id, "model_id"), _SEQ_ID.check(seq_id, "seq_id")


def check_loss_fn(loss_fn: Any) -> str:
    """A name; the engine checks that a loss has it."""
    return _LOSS_FN.check(loss_fn, "loss_fn")


def check_config(config: Mapping[str, Any], loss_fn: str) -> tuple[dict[str, float], str | None]:
    """Numbers by name, and the loss id of a custom loss, the only text that is accepted.

    Raises:
        InvalidRequest: A value is of another kind, or outside float32. (400)
    """
    numbers: dict[str, float] = {}
    loss_id = None
    for name, value in config.items():
        where = f"loss_fn_config.{name[:60]}"
        if loss_fn == CUSTOM and name == "loss_id":
            loss_id = _LOSS_ID.check(value, where)
        else:
            numbers[name] = _SETTING.check(_number(loss_fn, name, value), where)
    return numbers, loss_id


def reads_provenance(loss_fn: str) -> bool:
    """Whether the loss reads the spans of its datums; for the others they have no effect."""
    return loss_fn in LOSS_FNS and LOSS_FNS[loss_fn].needs_provenance


def _number(loss_fn: str, name: str, value: Any) -> Any:
    """The number that a text holds, for the settings that clients send as text too."""
    setting = LOSS_FNS[loss_fn].config.get(name) if loss_fn in LOSS_FNS else None
    if setting is None or not setting.may_be_text or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def check_num_datums(num_datums: int) -> None:
    """Refuse an empty request, and one with too many datums."""
    if num_datums == 0:
        raise InvalidDatum("data: is empty; send at least one datum")
    if num_datums > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"data: {num_datums} datums; this server takes {settings.MAX_DATUMS} in one request"
        )
