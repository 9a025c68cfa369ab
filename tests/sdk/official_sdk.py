"""The official SDK as the other end: it encodes what we parse, and decodes what we encode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from training.errors import TrainingError


def refusal(parse: Callable[..., object], *args: object) -> str | None:
    """The client's error message; None without an error."""
    try:
        parse(*args)
    except TrainingError as error:
        return str(error)
    return None


def sdk_datum(tokens: list[int], **loss_fn_inputs: Any) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=loss_fn_inputs
    )


def sdk_message(
    data: list[types.Datum],
    *,
    loss_fn: str = "cross_entropy",
    config: Mapping[str, float | str] | None = None,
    model_id: str = "s:train:0",
    seq_id: int = 1,
    forward_only: bool = False,
) -> Any:
    """The SDK's own protobuf message, as it is before it is serialized."""
    message = forward_backward_request_to_proto(
        ForwardBackwardRequest(
            forward_backward_input=ForwardBackwardInput(
                data=data,
                loss_fn=loss_fn,  # type: ignore[arg-type]
                loss_fn_config=config,
            ),
            model_id=model_id,
            seq_id=seq_id,
        )
    )
    message.forward_only = forward_only
    return message


def sdk_body(data: list[types.Datum], **more: Any) -> bytes:
    """The body that the SDK would send."""
    body: bytes = sdk_message(data, **more).SerializeToString()
    return body
