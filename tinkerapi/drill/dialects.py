"""A drill's requests in the dialects of the quick reference and of the tinker SDK."""

from __future__ import annotations

from typing import Any

from tinkerapi.drill.job import Datum, Request
from tinkerapi.drill.transport import Json

PATHS = {
    "create": "add_lora",
    "forward_backward": "forward_backward",
    "optim_step": "optim_step",
    "sample": "sample",
    "sample_kept": "sample",
    "save": "save_weights",
    "keep": "save_weights_for_sampler",
    "load": "load_weights",
}
"""The quick reference's paths, below ``/api/v1/``; those that return a future end in ``_async``."""


def quick_reference_body(request: Request, model_id: str) -> Json:
    """The body for one of PATHS."""
    fields = request.fields
    match request.kind:
        case "create":
            body: Json = dict(fields)
        case "forward_backward":
            body = {
                "data": [
                    {
                        "model_input": datum.tokens,
                        "loss_fn_inputs": {
                            "target_tokens": datum.targets,
                            "weights": datum.weights,
                        },
                    }
                    for datum in fields["data"]
                ],
                "loss_fn": "cross_entropy",
            }
        case "optim_step":
            body = {"adam_params": fields}
        case "save" | "keep":
            body = {"name": fields["name"]}
        case "load":
            body = {"path": f"tinker://{model_id}/weights/{fields['name']}"}
        case "sample_kept":
            path = f"tinker://{model_id}/sampler_weights/{fields['name']}"
            return {"model_path": path, "prompt": fields["prompt"], **_sampling(fields)}
        case _:
            body = {"prompt": fields["prompt"], **_sampling(fields)}
    return {"model_id": model_id, **body}


def sdk_body(request: Request, model_id: str) -> tuple[str, Json]:
    """Path and body, without the numbers of the request in its model or session."""
    fields = request.fields
    match request.kind:
        case "create":
            return "/api/v1/create_model", {"lora_config": fields}
        case "forward_backward":
            given = {
                "data": [_sdk_datum(datum) for datum in fields["data"]],
                "loss_fn": "cross_entropy",
            }
            return "/api/v1/forward_backward", {"forward_backward_input": given}
        case "optim_step":
            return "/api/v1/optim_step", {"adam_params": fields}
        case "save":
            return "/api/v1/save_weights", {"path": fields["name"]}
        case "keep":
            return "/api/v1/save_weights_for_sampler", {}
        case "load":
            path = f"tinker://{model_id}/weights/{fields['name']}"
            return "/api/v1/load_weights", {"path": path}
    return "/api/v1/asample", {"prompt": _chunks(fields["prompt"]), **_sampling(fields)}


def _sampling(fields: dict[str, Any]) -> Json:
    return {
        "num_samples": fields["num_samples"],
        "prompt_logprobs": True,
        "sampling_params": {name: fields[name] for name in ("seed", "max_tokens")},
    }


def _chunks(tokens: list[int]) -> Json:
    return {"chunks": [{"type": "encoded_text", "tokens": tokens}]}


def _sdk_datum(datum: Datum) -> Json:
    return {
        "model_input": _chunks(datum.tokens),
        "loss_fn_inputs": {
            "target_tokens": {"data": datum.targets, "dtype": "int64"},
            "weights": {"data": datum.weights, "dtype": "float32"},
        },
    }
