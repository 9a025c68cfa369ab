"""A good request to every address that takes a body or a name, as full as one can be.

They are what the isolation tests ask with, and fuller ones where a body has places that those leave
out. ``{ids}`` are the asker's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.urls import Resolver404, resolve

from tests.isolation.conftest import Ids
from tests.isolation.routes import DATUM, ROUTES, Open, Probe
from tests.isolation.test_routes import filled
from tests.sdk.test_custom_loss_steps import GRAPH, INPUTS
from tinkerapi.api.fields.field import Field, Object

SPARSE = {
    "data": [1],
    "dtype": "int64",
    "shape": [1, 2],
    "sparse_crow_indices": [0, 1],
    "sparse_col_indices": [0],
}
SDK_PARAMS = {
    "max_tokens": 2,
    "seed": 1,
    "stop": ["x"],
    "temperature": 1.0,
    "top_k": 5,
    "top_p": 0.5,
}
QUICK_DATUM = {
    "model_input": [1, 2],
    "loss_fn_inputs": {"target_tokens": [2, 3], "weights": {"data": [1.0, 1.0], "shape": [2]}},
}
CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Example:
    """One request; ``body`` None sends none."""

    method: str
    path: str
    body: Any = None
    sdk: bool = False


def post(path: str, body: Any, *, sdk: bool = False) -> Example:
    return Example("POST", path, body, sdk)


def fuller(model: str, plain: str, session: str, sampler: str, base: str) -> list[Example]:
    """Bodies with everything in them that a client can send."""
    adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    numbered = {"model_id": model, "seq_id": 1}
    metadata = {"a": "b"}
    forward = {"data": [DATUM], "loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 0.5}}
    return [
        post("/api/v1/create_session", {
            "tags": ["a"], "user_metadata": {"a": {"b": [1, "c"]}}, "sdk_version": "0.38.0",
            "project_id": "p", "display_name": "d",
        }, sdk=True),
        post("/api/v1/create_model", {
            "session_id": session, "model_seq_id": 1, "base_model": base,
            "user_metadata": {"a": {"b": [1]}}, "optimizer_config": {"type": "adamw"},
            "lora_config": {"rank": 4, "seed": 1, "train_mlp": True, "train_attn": True,
                            "train_unembed": False},
        }, sdk=True),
        post("/api/v1/sessions/search", {
            "user_metadata": metadata, "owner": {"type": "user", "owner_urns": ["tml:user:x"]},
            "statuses": [{"type": "failed", "reasons": ["x"]}], "limit": 5, "project_ids": ["x"],
            "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": session},
            "display_name": "d",
        }, sdk=True),
        post(f"/api/v1/sessions/{session}/finish", {
            "reason": {"type": "success"}, "detail": "done",
        }, sdk=True),
        Example("PUT", f"/api/v1/sessions/{session}/project", {"project_id": "p"}, sdk=True),
        post("/api/v1/create_custom_loss", {
            "session_id": session, "custom_loss_seq_id": 1, "name": "x", "inputs": INPUTS,
            "graph": GRAPH,
        }, sdk=True),
        post("/api/v1/forward_backward", {**numbered, "forward_backward_input": forward}, sdk=True),
        post("/api/v1/forward", {**numbered, "forward_input": forward}, sdk=True),
        post("/api/v1/optim_step", {**numbered, "adam_params": adam}, sdk=True),
        post("/api/v1/save_weights", {
            **numbered, "path": "kept", "ttl_seconds": 1000, "overwrite": True,
            "user_metadata": metadata,
        }, sdk=True),
        post("/api/v1/save_weights_for_sampler", {
            **numbered, "path": "kept", "ttl_seconds": 1000, "user_metadata": metadata,
            "kind": "snapshot",
        }, sdk=True),
        post("/api/v1/save_weights_external", {
            **numbered, "path": "kept", "ttl_seconds": 1000, "age_encryption_recipients": [],
        }, sdk=True),
        post("/api/v1/asample", {
            "sampling_session_id": sampler, "seq_id": 1, "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
            "sampling_params": SDK_PARAMS, "prompt_logprobs": True, "topk_prompt_logprobs": 1,
            "topk_sample_logprobs": 1, "prompt_alt_tokens_k": 1, "target_prompt_logprobs": SPARSE,
        }, sdk=True),
        post("/api/v1/retrieve_futures", {
            "target": {"type": "sampling_session", "sampling_session_id": sampler,
                       "cloned_sampler_id": 0},
            "prev_cursor": 1, "timeout": 0, "retrieved_request_ids": ["future_x"],
        }, sdk=True),
        post("/api/v1/telemetry", {"events": [{"a": 1}], "session_id": session}, sdk=True),
        post("/api/v1/client/config", {"sdk_version": "0.38.0"}, sdk=True),
        post("/fwdbwd", {
            "model_id": plain, "data": [CHAT, {"messages": CHAT}, QUICK_DATUM],
            "loss_fn": "cross_entropy", "loss_fn_config": {"beta": 0.1}, "train_on": "all",
        }),
        post("/optim_step", {"model_id": plain, "adam_params": adam}),
        post("/api/v1/add_lora", {
            "model_id": "another", "base_model": base, "rank": 4, "alpha": 8.0, "seed": 1,
            "target_modules": ["q_proj"], "train_mlp": True, "share_across_experts": False,
        }),
        post("/save_weights", {
            "model_id": plain, "name": "kept", "overwrite": True, "ttl_seconds": 1000,
            "user_metadata": metadata,
        }),
        post("/api/v1/asample", {
            "model_id": plain, "prompts": ["hi", [1, 2], CHAT], "num_samples": 1,
            "sampling_params": SDK_PARAMS, "prompt_logprobs": True,
        }),
        post("/api/v1/asample", {"model_id": plain, "prompt": {"chunks": [{"tokens": [1]}]}}),
        post("/api/v1/asample", {"base_model": base, "messages": CHAT}),
        post("/v1/completions", {
            "model": base, "prompt": ["hi", [1, 2]], "max_tokens": 2, "n": 1, "stop": ["x"],
            "logprobs": 2, "seed": 1, "user": "me",
        }),
        post("/v1/chat/completions", {
            "model": base, "messages": [*CHAT, {"role": "user", "content": [
                {"type": "text", "text": "more"}]}],
            "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "stop": "x", "metadata": {},
            "stream_options": {"include_usage": True},
        }),
    ]  # fmt: skip


def examples(ids: Ids, base_model: str) -> list[Example]:
    """Every request, with the asker's own ids in it."""
    own = ids | {"base_model": base_model} | {f"own_{name}": value for name, value in ids.items()}
    found = [
        Example(entry.method, filled(entry.path, own), filled(entry.body, own), entry.sdk)
        for entries in ROUTES.values()
        if not isinstance(entries, Open)
        for entry in entries
        if isinstance(entry, Probe)
    ]
    found += fuller(
        ids["sdk_model"], ids["plain_model"], ids["session"], ids["sampler"], base_model
    )
    return list({repr(example): example for example in found}.values())


def declared_fields(example: Example) -> list[str]:
    """The dotted names of all fields that the address says it reads."""
    try:
        view = resolve(example.path.partition("?")[0]).func
    except Resolver404:
        return []
    names = inspect.getclosurevars(view).nonlocals
    view_class = getattr(names.get("sdk") if example.sdk else None, "view_class", None)
    view_class = view_class or getattr(view, "view_class", None)
    return list(_dotted(getattr(view_class, "fields", {})))


def _dotted(fields: Mapping[str, Field], prefix: str = "") -> Iterator[str]:
    for name, field in fields.items():
        yield prefix + name
        if isinstance(field, Object):
            yield from _dotted(field.fields, f"{name}.")
