"""Sampling: sampling sessions, their clients, and samples."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpResponse
from rest_framework.request import Request

from futures.selectors import Completion, lane_completions
from futures.waiters import read_when_woken
from tinkerapi.api import threads
from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.chunks import num_tokens_of
from tinkerapi.api.fields.field import (
    MAX_FLOAT,
    Choice,
    Custom,
    Field,
    Flag,
    Integer,
    Number,
    Text,
    check_object,
)
from tinkerapi.api.fields.refusals import refuse
from tinkerapi.api.fields.sampling import check_num_samples
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView
from tinkerapi.api.sdk.parse.json_bodies import parse_model_input, parse_sampling_params
from tinkerapi.api.sdk.parse.scoring import SCORING_FIELDS, check_scoring
from tinkerapi.api.sdk.views.futures import POLL_SECONDS
from tinkerapi.api.sdk.views.service import SESSION_ID
from training.selectors import sampling_session_get
from training.services.recorded_samples import sequence_id
from training.services.sampling_sessions import (
    sampling_session_create,
    sampling_session_join,
    session_sample_submit,
)
from training.types import SamplingParams

SEQ_IDS_PER_CLIENT = 10**9
"""A client's seq ids begin at its number times this, as in the SDK."""

MAX_CLIENT = 2**63 // SEQ_IDS_PER_CLIENT - 1

MAX_CURSOR = 2**53
"""Microseconds; any JSON reader represents it exactly, and it is two centuries from now."""

LOOK_BACK_MICROSECONDS = 5_000_000

SAMPLING_SESSION_ID = Text(description="The sampling session.", required=True, max_length=120)


class CreateSamplingSessionView(SdkView):
    """Create a sampling session of a base model or a checkpoint."""

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
    """Describe a sampling session."""

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
    """Give another client of a sampling session its own number."""

    fields: ClassVar[Mapping[str, Field]] = {"sampling_session_id": SAMPLING_SESSION_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        number = sampling_session_join(owner_id=owner_of(request), **body)
        return JSONResponse({"client_counter": number, "type": "join_sampling_session"})


class SampleView(SdkView):
    """Continue one prompt.

    An invalid request is refused at once: the numbers of a sampling session have no order, so a
    refused request need not use its number.
    """

    takes_data = True
    fields: ClassVar[Mapping[str, Field]] = {
        "sampling_session_id": SAMPLING_SESSION_ID,
        "seq_id": Integer(description="The client's number of it.", required=True),
        "prompt": Custom(
            description="Token ids and images.", required=True, checker=parse_model_input, json={}
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
        **SCORING_FIELDS,
        "record_stability_info": Flag(
            description="Keep the sequences for the loss stable_reinforce.", default=False
        ),
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        prompt = body.pop("prompt")
        scoring = check_scoring(
            {name: body.pop(name) for name in SCORING_FIELDS},
            num_prompt_tokens=num_tokens_of(prompt),
            prompt_logprobs=body["prompt_logprobs"],
            num_sampled_tokens=body["num_samples"]
            * (body["sampling_params"].max_tokens or settings.DEFAULT_MAX_TOKENS),
        )
        record = body.pop("record_stability_info")
        future = session_sample_submit(
            owner_id=owner_of(request), prompt=prompt, scoring=scoring, record=record, **body
        )
        return JSONResponse(
            {
                "request_id": future.id,
                "sample_sequence_ids": [
                    sequence_id(future.id, number) for number in range(body["num_samples"])
                ],
            }
        )


def _check_target(value: Any, where: str) -> dict[str, Any]:
    fields: Mapping[str, Field] = {
        "type": Choice(description="", choices=("sampling_session",), required=True),
        "sampling_session_id": SAMPLING_SESSION_ID,
        "cloned_sampler_id": Integer(description="Its client.", maximum=MAX_CLIENT, default=0),
    }
    return check_object(fields, value, where)


def _check_request_ids(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise refuse(where, "a list of request ids", value)
    return value


class RetrieveFuturesView(SdkView):
    """Lists a client's final samples of a sampling session; the poll is held until there is one.

    The client keeps the cursor, so the server keeps no state and may restart.
    """

    fields: ClassVar[Mapping[str, Field]] = {
        "target": Custom(
            description="Whose samples.", required=True, checker=_check_target, json={}
        ),
        "prev_cursor": Integer(
            description="The cursor of the last answer.", maximum=MAX_CURSOR, default=0
        ),
        "timeout": Number(
            description="Most seconds to hold the poll; 0 answers at once.", maximum=MAX_FLOAT
        ),
        # Results are kept as long as the retention says, whether they were fetched or not.
        "retrieved_request_ids": Custom(
            description="Fetched.", default=[], checker=_check_request_ids, json={}
        ),
    }

    def post(self, request: Request) -> HttpResponse | Awaitable[HttpResponse]:
        body = self.checked_body(request)
        target, cursor = body["target"], body["prev_cursor"]
        lane_id = sampling_session_get(
            owner_id=owner_of(request), sampling_session_id=target["sampling_session_id"]
        ).id
        first = target["cloned_sampler_id"] * SEQ_IDS_PER_CLIENT
        seq_ids = range(first, first + SEQ_IDS_PER_CLIENT)

        def completions(after: int) -> HttpResponse | None:
            found, newest = lane_completions(lane_id=lane_id, seq_ids=seq_ids, after=after)
            return _completions_answer(found, max(newest, cursor)) if found else None

        if answer := completions(cursor):
            return answer
        if body["timeout"] == 0:
            return _completions_answer([], cursor)
        return self._waited(lane_id, completions, cursor, body["timeout"])

    async def _waited(
        self,
        lane_id: str,
        completions: Callable[[int], HttpResponse | None],
        cursor: int,
        timeout_seconds: float | None,
    ) -> HttpResponse:
        answer = await read_when_woken(
            lane_id,
            lambda: threads.in_database_thread(completions, cursor),
            timeout_seconds=min(POLL_SECONDS, timeout_seconds or POLL_SECONDS),
        )
        if answer is None:  # results missed because of a cancellation; repeating one is harmless
            look_back = max(cursor - LOOK_BACK_MICROSECONDS, 0)
            answer = await threads.in_database_thread(completions, look_back)
        return answer or _completions_answer([], cursor)


def _completions_answer(found: list[Completion], cursor: int) -> HttpResponse:
    completions = [
        {"request_id": item.request_id, "state": "finished" if item.is_ready else "failed"}
        for item in found
    ]
    return JSONResponse({"completions": completions, "cursor": cursor})
