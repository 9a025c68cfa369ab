"""Parses provenance spans: protobuf, and protobuf's JSON form.

``[{"sampled_tokens": {"sequence_id": "...", "offset": 0, "length": 3}}, ...]``. Their meaning is
in ``training.provenance``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tinkerapi.api.fields.field import Integer, Text, check_object
from tinkerapi.api.fields.refusals import refuse
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from training.errors import InvalidDatum
from training.types import Provenance, ProvenanceSpan

FIELDS = ("model_input_spans", "loss_fn_input_spans")

_SPAN = {
    "sequence_id": Text(description="A sampled sequence.", max_length=120, required=True),
    "offset": Integer(description="Where it begins.", maximum=MAX_TOKEN_ID, default=0),
    "length": Integer(description="How long it is.", maximum=MAX_TOKEN_ID, required=True),
}
_KINDS = {"prompt_tokens": False, "sampled_tokens": True}


def provenance_of_message(datum: pb.Datum, where: str) -> Provenance | None:
    """The provenance of a protobuf datum's tokens; None if it has none.

    Raises:
        InvalidDatum: One of the two lists is missing, or a span is invalid. (400)
    """
    given = {name: [_arm(span) for span in getattr(datum, name)] for name in FIELDS}
    return _provenance(given, where)


def provenance_of_json(datum: dict[str, Any], where: str) -> Provenance | None:
    """The same for a JSON datum.

    Raises:
        InvalidDatum: One of the two lists is missing, or a span is invalid. (400)
    """
    return _provenance({name: datum.get(name) or [] for name in FIELDS}, where)


def _arm(span: pb.ProvenanceSpan) -> dict[str, Any]:
    kind = span.WhichOneof("source")
    if kind is None:
        return {}
    arm = getattr(span, kind)
    return {kind: {name: getattr(arm, name) for name in _SPAN}}


def _provenance(given: dict[str, Any], where: str) -> Provenance | None:
    if not any(given.values()):
        return None
    for name, spans in given.items():
        if not isinstance(spans, list):
            raise InvalidDatum(str(refuse(f"{where}.{name}", "a list of spans", spans)))
        if not spans:
            raise InvalidDatum(f"{where}.{name}: missing; spans come in pairs")
    tiles = {name: tuple(_spans(spans, f"{where}.{name}")) for name, spans in given.items()}
    return Provenance(
        model_input=tiles["model_input_spans"], loss_fn_inputs=tiles["loss_fn_input_spans"]
    )


def _spans(spans: list[Any], where: str) -> Iterable[ProvenanceSpan]:
    for index, span in enumerate(spans):
        place = f"{where}[{index}]"
        if not isinstance(span, dict) or len(span) != 1 or next(iter(span)) not in _KINDS:
            raise InvalidDatum(f"{place}: expected one of {' and '.join(_KINDS)}")
        [(kind, fields)] = span.items()
        checked = check_object(_SPAN, fields, f"{place}.{kind}")
        yield ProvenanceSpan(is_sampled=_KINDS[kind], **checked)
