"""Sampling: sampling sessions, their clients, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.fields import Custom, Field, Flag, Integer, Text
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView
from tinkerapi.api.sdk.json_requests import parse_model_input, parse_sampling_params
from tinkerapi.api.sdk.views.service import SESSION_ID
from tinkerapi.api.views.base import owner_of
from tinkerapi.api.views.sampling import check_num_samples
from training.errors import InvalidRequest
from training.selectors import sampling_session_get
from training.services.sampling_sessions import (
    sampling_session_create,
    sampling_session_join,
    session_sample_submit,
)
from training.types import SamplingParams

SAMPLING_SESSION_ID = Text(description="The sampling session.", required=True, max_length=120)


def _refuse_option(value: Any, where: str) -> None:
    """An option that does nothing as long as it is off; ignoring it otherwise would be wrong."""
    if value not in (0, False):
        raise InvalidRequest(f"{where}: this server does not have this option")


def _refused(description: str) -> Custom:
    return Custom(description=description, checker=_refuse_option, json={})


class CreateSamplingSessionView(SdkView):
    """Settle what a client samples from."""

    fields: ClassVar[Mapping[str, Field]] = {
        "session_id": SESSION_ID,
        "sampling_session_seq_id": Integer(description="Its number there.", required=True),
        "base_model": Text(description="A base model.", max_length=255),
        "model_path": Text(description="A checkpoint instead.", max_length=500),
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        made = sampling_session_create(owner_id=owner_of(request), **body)
        return JSONResponse({"sampling_session_id": made.id, "type": "create_sampling_session"})


class SamplerView(SdkView):
    """Say what a sampling session samples from."""

    def get(self, request: Request, sampling_session_id: str) -> HttpResponse:
        found = sampling_session_get(
            owner_id=owner_of(request), sampling_session_id=sampling_session_id
        )
        return JSONResponse(
            {
                "sampler_id": found.id,
                "base_model": found.base_model,
                "model_path": found.model_path or None,
            }
        )


class JoinSamplingSessionView(SdkView):
    """Give one more client of a sampling session a number of its own."""

    fields: ClassVar[Mapping[str, Field]] = {"sampling_session_id": SAMPLING_SESSION_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        number = sampling_session_join(owner_id=owner_of(request), **body)
        return JSONResponse({"client_counter": number, "type": "join_sampling_session"})


class SampleView(SdkView):
    """Continue one prompt.

    What is wrong is refused at once: the numbers of a sampling session have no order, so none
    must be used up.
    """

    fields: ClassVar[Mapping[str, Field]] = {
        "sampling_session_id": SAMPLING_SESSION_ID,
        "seq_id": Integer(description="The client's number of it.", required=True),
        "prompt": Custom(
            description="Token ids.", required=True, checker=parse_model_input, json={}
        ),
        "sampling_params": Custom(
            description="How tokens are chosen.",
            default=SamplingParams(),
            checker=parse_sampling_params,
            json={},
        ),
        "num_samples": Custom(
            description="Sequences.", checker=check_num_samples, json={}, default=1
        ),
        "prompt_logprobs": Flag(description="Score the prompt.", default=False),
        "topk_prompt_logprobs": _refused("Likeliest tokens of each prompt position."),
        "topk_sample_logprobs": _refused("Likeliest tokens of each sampled position."),
        "target_prompt_logprobs": _refused("Scores of other tokens in the prompt."),
        "prompt_alt_tokens_k": _refused("Sampled alternatives to the prompt's tokens."),
        "prompt_logprobs_last_n": _refused("Score the end of the prompt only."),
        "record_stability_info": _refused("For the loss stable_reinforce."),
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        for name in [name for name, field in self.fields.items() if _is_refused(field)]:
            del body[name]
        body["prompt"] = body["prompt"].tolist()
        future = session_sample_submit(owner_id=owner_of(request), **body)
        return JSONResponse(
            {
                "request_id": future.id,
                "sample_sequence_ids": [
                    f"{future.id}-{number}" for number in range(body["num_samples"])
                ],
            }
        )


def _is_refused(field: Field) -> bool:
    return isinstance(field, Custom) and field.checker is _refuse_option
