"""Loss functions that clients trace in Python and upload as a graph."""

from __future__ import annotations

import hashlib

from django.http import HttpResponse
from rest_framework.request import Request

from futures.services import Refusal
from futures.transitions import Category
from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.field import Integer
from tinkerapi.api.fields.refusals import check_json, refuse_unknown
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView, json_fields
from tinkerapi.api.sdk.views.service import SESSION_ID
from training.custom_loss_graph import check_graph
from training.errors import InvalidRequest
from training.services.custom_losses import custom_loss_create, custom_loss_refuse

_SEQ_ID = Integer(description="Its number in the session.", maximum=2**31 - 1)
_KNOWN = ("session_id", "custom_loss_seq_id", "name", "inputs", "graph", "type")


class CreateCustomLossView(SdkView):
    """Store a loss of the session; its future reports what is wrong with it."""

    takes_data = True

    def post(self, request: Request) -> HttpResponse:
        owner_id = owner_of(request)
        raw = self.raw_body(request)
        body = json_fields(raw)
        session_id = SESSION_ID.check(body.get("session_id"), "session_id")
        seq_id = _SEQ_ID.check(body.get("custom_loss_seq_id"), "custom_loss_seq_id")
        try:
            refuse_unknown(body.keys(), _KNOWN)
            for name in ("name", "inputs", "graph"):
                check_json(body.get(name), name)
            check_graph(body.get("name"), body.get("inputs"), body.get("graph"))
        except InvalidRequest as error:
            future = custom_loss_refuse(
                owner_id=owner_id,
                session_id=session_id,
                seq_id=seq_id,
                body_digest=hashlib.sha256(raw).hexdigest(),
                refusal=Refusal(
                    error=str(error), category=Category.USER, error_code=type(error).__name__
                ),
            )
        else:
            future = custom_loss_create(
                owner_id=owner_id,
                session_id=session_id,
                seq_id=seq_id,
                name=body["name"],
                inputs=body["inputs"],
                graph=body["graph"],
            )
        return JSONResponse({"request_id": future.id})
