"""OpenAI's endpoints: models, completions, chat completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from rest_framework.request import Request

from futures.cancelling import future_cancel
from futures.errors import FutureNotCancellable
from futures.models import Future
from futures.transitions import State
from futures.waiters import future_wait
from tinkerapi.api.bodies.parsers import json_object
from tinkerapi.api.caller import idempotency_key_of, owner_of
from tinkerapi.api.fields.field import Field, check_object
from tinkerapi.api.leaving import when_client_leaves
from tinkerapi.api.openai.answers import AnswerForm, ChatForm, CompletionForm
from tinkerapi.api.openai.base import (
    OpenAIView,
    model_not_found,
    not_finished,
    sample_failed,
)
from tinkerapi.api.openai.error_body import REQUEST_ID
from tinkerapi.api.openai.options import Options, chat_options, completion_options
from tinkerapi.api.openai.streams import answer_chunks, event_stream
from tinkerapi.api.openai.tables import CHAT_FIELDS, COMPLETION_FIELDS
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.results import rendered
from training.base_models import base_model_get, base_models
from training.errors import BaseModelNotFound, CheckpointNotFound, InvalidRequest
from training.listings import samplers_listed
from training.models import Checkpoint
from training.paths import TinkerPath
from training.selectors import checkpoint_get
from training.services import sample_submit

BASE_MODEL_CREATED = 0  # unknown
BASE_MODEL_OWNER = "tinkerapi"


class ModelListView(OpenAIView):
    """List base models, then your sampler checkpoints, newest first."""

    def get(self, request: Request) -> HttpResponse:
        entries = [_base_model_entry(model.name) for model in base_models()]
        entries += map(_checkpoint_entry, samplers_listed(owner_of(request)))
        return JSONResponse({"object": "list", "data": entries})


class ModelView(OpenAIView):
    """Describe one model."""

    def get(self, request: Request, model: str) -> HttpResponse:
        path = _model_path(model)
        try:
            if path is None:
                return JSONResponse(_base_model_entry(base_model_get(model).name))
            found = checkpoint_get(owner_id=owner_of(request), path=path)
        except (BaseModelNotFound, CheckpointNotFound):
            raise model_not_found(model) from None
        return JSONResponse({**_checkpoint_entry(found), "id": model})


class SamplingView(OpenAIView):
    """A request for text."""

    takes_data = True
    fields: ClassVar[Mapping[str, Field]]
    form: ClassVar[AnswerForm]

    @abstractmethod
    def options_of(self, body: Mapping[str, Any]) -> Options:
        """The options in a checked body."""

    def source_of(self, request: Request, model: str) -> dict[str, Any]:
        """What to sample from, as ``sample_submit`` takes it.

        Raises:
            ModelNotFound: (404)
        """
        path = _model_path(model)
        return {
            "base_model": None if path else model,
            "model_path": str(path) if path else None,
        }

    def post(self, request: Request) -> Awaitable[HttpResponseBase]:
        given = json_object(request._request, max_bytes=self.max_body_bytes())
        body = check_object(self.fields, given)
        options = self.options_of(body)
        owner_id = owner_of(request)
        try:
            future = sample_submit(
                owner_id=owner_id,
                model_id=None,
                **self.source_of(request, options.model),
                prompts=options.prompts,
                num_samples=options.num_samples,
                sampling_params=options.sampling_params,
                prompt_logprobs=options.echo and options.logprobs,
                topk_sample_logprobs=options.top_logprobs,
                topk_prompt_logprobs=options.top_logprobs if options.echo else 0,
                token_texts=options.logprobs or options.echo,
                echo=options.echo,
                stream=options.stream,
                idempotency_key=idempotency_key_of(request),
            ).future
        except (BaseModelNotFound, CheckpointNotFound):
            raise model_not_found(options.model) from None
        if future.idempotency_key is None:  # the client cannot ask for it again
            when_client_leaves(request._request, partial(_cancel, future))
        answer = self._stream if options.stream else self._answer
        return answer(future, options, owner_id=owner_id)

    async def _stream(self, future: Future, options: Options, *, owner_id: int) -> HttpResponseBase:
        """Begin with the first text: a request that fails earlier has its own HTTP status."""
        chunks = answer_chunks(future, options, self.form, owner_id=owner_id)
        stream = event_stream(await anext(chunks), chunks, self.handle_exception)
        stream[REQUEST_ID] = future.id
        return stream

    async def _answer(self, future: Future, options: Options, *, owner_id: int) -> HttpResponseBase:
        """Wait without a thread and without a database connection."""
        final = await future_wait(
            future.id,
            owner_id=owner_id,
            timeout_seconds=settings.SYNC_TIMEOUT_SECONDS,
            is_known=True,
        )
        if final is None:
            raise not_finished(future)
        return await rendered(final, partial(self._finished, options=options))

    def _finished(self, future: Future, options: Options) -> JSONResponse:
        if future.state != State.READY:
            raise sample_failed(future, self.form.names)
        response = JSONResponse(self.form.answer(future, options))
        response[REQUEST_ID] = future.id
        return response


class CompletionView(SamplingView):
    """Continue text or tokens."""

    fields = COMPLETION_FIELDS
    form = CompletionForm()

    def options_of(self, body: Mapping[str, Any]) -> Options:
        return completion_options(body)


class ChatCompletionView(SamplingView):
    """Continue a conversation as the assistant."""

    fields = CHAT_FIELDS
    form = ChatForm()

    def options_of(self, body: Mapping[str, Any]) -> Options:
        return chat_options(body)


def _cancel(future: Future) -> None:
    """Stop a sample whose client has left."""
    with suppress(FutureNotCancellable):  # it has finished already
        future_cancel(request_id=future.id, owner_id=future.owner_id)


def _model_path(model: str) -> TinkerPath | None:
    """The sampler path in a model's name, or None if it can only be a base model.

    Raises:
        ModelNotFound: A path of another kind, or of another form. (404)
    """
    if not model.startswith("tinker://"):
        return None
    try:
        path = TinkerPath.parse(model, field="model")
    except InvalidRequest:
        raise model_not_found(model) from None
    if path.kind != Checkpoint.Kind.SAMPLER:
        raise model_not_found(model)
    return path


def _base_model_entry(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": BASE_MODEL_CREATED,
        "owned_by": BASE_MODEL_OWNER,
    }


def _checkpoint_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": str(checkpoint.path),
        "object": "model",
        "created": int(checkpoint.created_at.timestamp()),
        "owned_by": checkpoint.run.owner.get_username(),
    }
