"""Every address of the API, and the ways to try to reach another tenant's objects through it.

A placeholder such as ``{sdk_model}`` becomes another tenant's id or one that names nothing;
``{own_...}`` is always the asker's own. A route that is not here fails ``test_routes``: say what
ids it takes before it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.sdk.test_custom_loss_steps import GRAPH, INPUTS

HI = [[{"role": "user", "content": "hi"}]]
CREATION = {
    "base_model": "{base_model}",
    "lora_config": {"rank": 4},
    "optimizer_config": {"type": "adamw"},
}
DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "weights": {"data": [1.0, 1.0], "dtype": "float32", "shape": [2]},
    },
}
PASS = {"data": [DATUM], "loss_fn": "cross_entropy"}
CUSTOM_PASS = {"data": [DATUM], "loss_fn": "custom", "loss_fn_config": {"loss_id": "{loss}"}}


@dataclass(frozen=True)
class Probe:
    """One request that names another's thing."""

    path: str
    body: Any = None
    method: str = "POST"
    sdk: bool = False
    makes_own: bool = False
    """An unknown name creates an object of the caller, so the owner's answer does not differ."""


@dataclass(frozen=True)
class Listing:
    """A request without ids that returns the caller's objects."""

    path: str
    body: Any = None
    method: str = "GET"
    sdk: bool = True


@dataclass(frozen=True)
class Open:
    """Names nothing and tells nothing of anybody's; the reason."""

    why: str


def quick(path: str, *bodies: Any, makes_own: bool = False) -> list[Probe]:
    return [Probe(path, body, makes_own=makes_own) for body in bodies]


def sdk(path: str, *bodies: Any) -> list[Probe]:
    return [Probe(f"/api/v1/{path}", body, sdk=True) for body in bodies]


def at(method: str, path: str, body: Any = None) -> list[Probe]:
    return [Probe(f"/api/v1/{path}", body, method=method, sdk=True)]


def sdk_pass(name: str) -> list[Probe]:
    """A training step of the SDK: on another's model, and on the caller's own with another's
    loss."""
    part = "forward_input" if name == "forward" else "forward_backward_input"
    return sdk(
        name,
        {"model_id": "{sdk_model}", "seq_id": 6, part: PASS},
        {"model_id": "{own_sdk_model}", "seq_id": 6, part: CUSTOM_PASS},
    )


ANY_MODEL = ({"model_id": "{plain_model}"}, {"model_id": "{sdk_model}"})
SAMPLES = (
    {"model_id": "{plain_model}", "prompt": [1, 2]},
    {"model_id": "{sdk_model}", "prompt": [1, 2]},
    {"model_path": "tinker://{plain_model}/sampler_weights/{checkpoint}", "prompt": [1, 2]},
    {"model_path": "tinker://{sdk_model}/weights/{checkpoint}", "prompt": [1, 2]},
)
SAVES = tuple({**model, "name": "mine-now"} for model in ANY_MODEL)
LOADS = (
    {"model_id": "{plain_model}", "path": "tinker://{own_plain_model}/weights/{own_checkpoint}"},
    {"model_id": "{own_plain_model}", "path": "tinker://{plain_model}/weights/{checkpoint}"},
    {
        "model_id": "{own_plain_model}",
        "path": "tinker://{sdk_model}/weights/{checkpoint}",
    },
)
SDK_SAVES = (
    {"model_id": "{sdk_model}", "seq_id": 6, "path": "mine-now"},
    {"model_id": "{plain_model}", "seq_id": 6, "path": "mine-now"},
)
SDK_PATH = "tinker://{sdk_model}/weights/{checkpoint}"
CHECKPOINTS = [
    f"training_runs/{{sdk_model}}/checkpoints/{segment}/{{checkpoint}}"
    for segment in ("weights", "sampler_weights", "external_weights")
]
CHECKPOINT = "api/v1/training_runs/<str:run>/checkpoints/<path:checkpoint_id>"
HOURS = "starting_on={hour}&ending_before={next_hour}"


def on_checkpoints(method: str, suffix: str = "", body: Any = None) -> list[Probe]:
    return [probe for path in CHECKPOINTS for probe in at(method, path + suffix, body)]


def three(
    short: str | None, path: str, *bodies: Any, makes_own: bool = False
) -> dict[str, list[Probe]]:
    """The waiting form, the one with a future, and the short name of older clients."""
    names = [f"api/v1/{path}", f"api/v1/{path}_async", *([short] if short else [])]
    return {name: quick(f"/{name}", *bodies, makes_own=makes_own) for name in names}


_QUICK: dict[str, Sequence[Probe]] = {
    **three(
        "fwd",
        "forward",
        *({**model, "data": HI} for model in ANY_MODEL),
        makes_own=True,
    ),
    **three(
        "fwdbwd",
        "forward_backward",
        *({**model, "data": HI} for model in ANY_MODEL),
        makes_own=True,
    ),
    **three("optim_step", "optim_step", *ANY_MODEL),
    **three("add_lora", "add_lora", *ANY_MODEL, makes_own=True),
    **three("remove_lora", "remove_lora", *ANY_MODEL),
    **three("save_weights", "save_weights", *SAVES),
    **three("save_weights_for_sampler", "save_weights_for_sampler", *SAVES),
    "api/v1/save_weights_external": quick("/api/v1/save_weights_external", *SAVES),
    "api/v1/save_weights_external_async": quick("/api/v1/save_weights_external_async", *SAVES),
    **three("load_weights", "load_weights", *LOADS),
    "api/v1/sample": quick("/api/v1/sample", *SAMPLES),
    "api/v1/asample": quick("/api/v1/asample", *SAMPLES),
    "get_info": quick("/get_info", *ANY_MODEL),
    "api/v1/adapters/<str:model_id>": [
        Probe(f"/api/v1/adapters/{{{name}}}", method="DELETE")
        for name in ("plain_model", "sdk_model")
    ],
    "api/v1/runs/<str:run_id>/metrics": [
        Probe(f"/api/v1/runs/{{{name}}}/metrics", {"step": 1, "metrics": {"reward": 0.5}})
        for name in ("plain_model", "sdk_model")
    ],
    "retrieve_future": quick(
        "/retrieve_future",
        {"request_id": "{done}"},
        {"request_id": "{pending}"},
        {"request_id": "{pending}", "wait": 1},
    ),
    "cancel_future": quick("/cancel_future", {"request_id": "{pending}"}),
}

_BOTH_DIALECTS: dict[str, Sequence[Probe]] = {
    "api/v1/forward": sdk_pass("forward"),
    "api/v1/forward_backward": sdk_pass("forward_backward"),
    "api/v1/optim_step": sdk(
        "optim_step", {"model_id": "{sdk_model}", "seq_id": 6, "adam_params": {}}
    ),
    "api/v1/asample": sdk(
        "asample",
        {
            "sampling_session_id": "{sampler}",
            "seq_id": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        },
    ),
    "api/v1/save_weights": sdk("save_weights", *SDK_SAVES),
    "api/v1/save_weights_external": sdk("save_weights_external", *SDK_SAVES),
    "api/v1/save_weights_for_sampler": sdk(
        "save_weights_for_sampler",
        *SDK_SAVES,
        {"model_id": "{sdk_model}", "seq_id": 6, "sampling_session_seq_id": 9},
    ),
    "api/v1/load_weights": sdk(
        "load_weights",
        {"model_id": "{own_sdk_model}", "seq_id": 6, "path": SDK_PATH},
        {"model_id": "{sdk_model}", "seq_id": 6, "path": SDK_PATH},
        {"session_id": "{own_session}", "model_seq_id": 7, "path": SDK_PATH},
        {
            "session_id": "{session}",
            "model_seq_id": 7,
            "path": "tinker://{own_sdk_model}/weights/{own_checkpoint}",
        },
    ),
}

_SDK: dict[str, Sequence[Probe | Listing] | Open] = {
    "api/v1/session_heartbeat": sdk("session_heartbeat", {"session_id": "{session}"}),
    "api/v1/sessions/<str:session_id>/finish": at(
        "POST", "sessions/{session}/finish", {"reason": {"type": "success"}}
    ),
    "api/v1/create_model": sdk(
        "create_model",
        {"session_id": "{session}", "model_seq_id": 0, **CREATION},
        {"session_id": "{session}", "model_seq_id": 8, **CREATION},
    ),
    "api/v1/get_info": sdk("get_info", *ANY_MODEL),
    "api/v1/unload_model": sdk("unload_model", *ANY_MODEL),
    "api/v1/create_custom_loss": sdk(
        "create_custom_loss",
        {
            "session_id": "{session}",
            "custom_loss_seq_id": 1,
            "name": "x",
            "inputs": INPUTS,
            "graph": GRAPH,
        },
    ),
    "api/v1/retrieve_future": sdk(
        "retrieve_future", {"request_id": "{done}"}, {"request_id": "{pending}"}
    ),
    "api/v1/retrieve_futures": sdk(
        "retrieve_futures",
        {
            "target": {"type": "sampling_session", "sampling_session_id": "{sampler}"},
            "timeout": 0,
        },
    ),
    "api/v1/cancel_future": sdk("cancel_future", {"request_id": "{pending}"}),
    "api/v1/create_sampling_session": sdk(
        "create_sampling_session",
        {"session_id": "{own_session}", "sampling_session_seq_id": 9, "model_path": SDK_PATH},
        {
            "session_id": "{session}",
            "sampling_session_seq_id": 9,
            "base_model": "{base_model}",
        },
    ),
    "api/v1/samplers/<str:sampling_session_id>": at("GET", "samplers/{sampler}"),
    "api/v1/join_sampling_session": sdk(
        "join_sampling_session", {"sampling_session_id": "{sampler}"}
    ),
    "api/v1/weights_info": sdk("weights_info", {"tinker_path": SDK_PATH}),
    "api/v1/copy_weights": sdk(
        "copy_weights",
        {"source_path": SDK_PATH},
        {
            "source_path": "tinker://{own_sdk_model}/weights/{own_checkpoint}",
            "session_id": "{session}",
            "model_seq_id": 7,
        },
    ),
    "api/v1/training_runs": [
        Listing("/api/v1/training_runs"),
        Listing("/api/v1/training_runs?access_scope=accessible"),
        *at("GET", "training_runs?project_id={name}-project"),
    ],
    "api/v1/training_runs/<str:run>": [
        *at("GET", "training_runs/{sdk_model}"),
        *at("GET", "training_runs/{plain_model}?access_scope=accessible"),
    ],
    "api/v1/training_runs/<str:run>/checkpoints": at(
        "GET", "training_runs/{sdk_model}/checkpoints"
    ),
    f"{CHECKPOINT}/publish": [
        *on_checkpoints("POST", "/publish"),
        *on_checkpoints("DELETE", "/publish"),
    ],
    f"{CHECKPOINT}/ttl": on_checkpoints("PUT", "/ttl", {"ttl_seconds": 4000}),
    f"{CHECKPOINT}/external_weights_urls": on_checkpoints("GET", "/external_weights_urls"),
    f"{CHECKPOINT}/archive": on_checkpoints("GET", "/archive"),
    CHECKPOINT: on_checkpoints("DELETE"),
    "api/v1/checkpoints": [Listing("/api/v1/checkpoints")],
    "api/v1/downloads/<str:token>/<str:file_name>": Open("the link is the permission: test_links"),
    "api/v1/sessions": [
        Listing("/api/v1/sessions"),
        Listing("/api/v1/sessions?access_scope=accessible"),
    ],
    "api/v1/sessions/search": [
        Listing("/api/v1/sessions/search", {}, method="POST"),
        *sdk(
            "sessions/search",
            {"session_id": "{session}"},
            {"display_name": "{name}"},
            {"project_ids": ["{name}-project"]},
            {"user_metadata": {"note": "{name}-note"}},
            {"owner": {"type": "user", "owner_urns": ["tml:user:{name}"]}},
        ),
    ],
    "api/v1/sessions/<str:session_id>": at("GET", "sessions/{session}"),
    "api/v1/sessions/<str:session_id>/project": at(
        "PUT", "sessions/{session}/project", {"project_id": "taken"}
    ),
    "api/v1/sessions/<str:session_id>/trace_export": at("GET", "sessions/{session}/trace_export"),
    "api/v1/audit": [Listing("/api/v1/audit")],
    "api/v1/billing/usage/events": [Listing(f"/api/v1/billing/usage/events?{HOURS}")],
    "api/v1/billing/usage/checkpoints/current": [
        Listing("/api/v1/billing/usage/checkpoints/current"),
        *at("GET", "billing/usage/checkpoints/current?project_id={name}-project"),
    ],
    "api/v1/auth/apikey/me": [Listing("/api/v1/auth/apikey/me")],
}

_OPENAI: dict[str, Sequence[Probe | Listing]] = {
    "v1/models": [Listing("/v1/models", sdk=False)],
    "v1/models/<path:model>": [
        Probe("/v1/models/tinker://{plain_model}/sampler_weights/{checkpoint}", method="GET")
    ],
    "v1/completions": quick(
        "/v1/completions",
        {"model": "tinker://{plain_model}/sampler_weights/{checkpoint}", "prompt": "x"},
    ),
    "v1/chat/completions": quick(
        "/v1/chat/completions",
        {
            "model": "tinker://{plain_model}/sampler_weights/{checkpoint}",
            "messages": [{"role": "user", "content": "x"}],
        },
    ),
}

_SERVER = Open("describes the server")
_MAKES = Open("makes something of the asker's own, by no id")

ROUTES: dict[str, list[Probe | Listing] | Open] = {
    "": _SERVER,
    "admin": _SERVER,
    "favicon.ico": _SERVER,
    "docs": _SERVER,
    "docs/": _SERVER,
    "docs/<slug:folder>/<str:name>": _SERVER,
    "docs/<slug:name>": _SERVER,
    "docs/<slug:name>/": _SERVER,
    "admin/invitation/<uidb64>/<token>/": Open("the token is the permission"),
    "playground/chat": Open("takes a session of the admin only; tests/console/test_playground.py"),
    "healthz": _SERVER,
    "readyz": _SERVER,
    "metrics": Open("sums over all users, for superusers and programs on this machine"),
    "get_server_capabilities": _SERVER,
    "list_loss_functions": _SERVER,
    "api/schema": _SERVER,
    "api/docs": _SERVER,
    "api/docs/": _SERVER,
    "api/v1/healthz": _SERVER,
    "api/v1/get_server_capabilities": _SERVER,
    "api/v1/client/config": _SERVER,
    "api/v1/client/dynamic_config": _SERVER,
    "api/v1/telemetry": Open("forgets what it is sent"),
    "api/v1/import_adapter": _MAKES,
    "api/v1/import_adapter_async": _MAKES,
    "api/v1/auth/token": Open("a token for the asker's own key"),
    "api/v1/create_session": _MAKES,
    "api/v1/adapters": [Listing("/api/v1/adapters", sdk=False)],
}
for _table in (_QUICK, _BOTH_DIALECTS, _SDK, _OPENAI):
    for _route, _entries in _table.items():
        if isinstance(_entries, Open):
            ROUTES[_route] = _entries
        else:
            _known = ROUTES.setdefault(_route, [])
            assert isinstance(_known, list)
            _known.extend(_entries)
