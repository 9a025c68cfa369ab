"""People and the traces of their training, made by the real services and the real work loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.contrib.auth.models import User
from django.db.models import Model
from django.test import Client
from django.urls import reverse

import tinkerapi.urls  # noqa: F401 - the admin knows its pages
from futures.models import Future
from tests.conftest import InProcessWorker
from tinkerapi.services import api_key_create
from training.models import Run, SamplingSession, Session
from training.services import (
    forward_backward_submit,
    optim_step_submit,
    sample_submit,
    save_weights_submit,
)
from training.types import AdamParams, Conversation, Message, SamplingParams

SCRIPT = "<script>alert(1)</script>"

_numbers = itertools.count(1)


@pytest.fixture
def user_factory(db: None) -> Callable[..., User]:
    def make(**fields: Any) -> User:
        return User.objects.create(username=f"person-{next(_numbers)}", **fields)

    return make


@pytest.fixture
def superuser(user_factory: Callable[..., User]) -> User:
    return user_factory(is_staff=True, is_superuser=True)


@pytest.fixture
def staff(user_factory: Callable[..., User]) -> User:
    """May enter the admin, and nothing else."""
    return user_factory(is_staff=True)


@pytest.fixture
def browser() -> Callable[[User], Client]:
    def make(user: User) -> Client:
        client = Client()
        client.force_login(user)
        return client

    return make


@pytest.fixture
def console(superuser: User, browser: Callable[[User], Client]) -> Client:
    """The admin as a superuser sees it."""
    return browser(superuser)


@pytest.fixture
def trained(work: InProcessWorker) -> Callable[..., SimpleNamespace]:
    """``trained(owner)``: a run with a step, a sample, a checkpoint, a failure and a wait."""

    def make(owner: User, *, name: str | None = None, text: str = "hello") -> SimpleNamespace:
        name = name or f"run-{next(_numbers)}"
        data = [Conversation((Message("user", text), Message("assistant", "yes")))]
        mine: dict[str, Any] = {"owner_id": owner.pk, "model_id": name}
        forward_backward = forward_backward_submit(
            **mine,
            data=data,
            loss_fn="cross_entropy",
            loss_fn_config={},
            train_on="auto",
            forward_only=False,
        ).future
        optim_step = optim_step_submit(**mine, adam_params=AdamParams(learning_rate=0.5)).future
        sample = sample_submit(
            **mine,
            base_model=None,
            model_path=None,
            prompts=[text],
            num_samples=1,
            sampling_params=SamplingParams(max_tokens=4, seed=1),
            prompt_logprobs=False,
        ).future
        save = save_weights_submit(
            **mine,
            name=f"step-{next(_numbers)}",
            kind="training",
            overwrite=False,
            ttl_seconds=None,
            user_metadata={"note": text},
        ).future
        work()
        waiting = optim_step_submit(**mine, adam_params=AdamParams()).future
        run = Run.objects.get(owner=owner, name=name)
        session = Session.objects.create(owner=owner, sdk_version="0.1", display_name=text[:200])
        sampling_session = SamplingSession.objects.create(
            id=f"{session.pk}:sample:1",
            session=session,
            seq_id=1,
            base_model=run.base_model,
            checkpoint=run.checkpoints.get(),
            model_path=f"tinker://{name}/weights/x",
        )
        api_key, _ = api_key_create(user=owner, name=text[:100])
        return SimpleNamespace(
            run=run,
            forward_backward=Future.objects.get(pk=forward_backward.pk),
            optim_step=Future.objects.get(pk=optim_step.pk),
            sample=Future.objects.get(pk=sample.pk),
            save=Future.objects.get(pk=save.pk),
            waiting=waiting,
            checkpoint=run.checkpoints.get(),
            session=session,
            sampling_session=sampling_session,
            api_key=api_key,
        )

    return make


def list_page(model: type[Model]) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")


def page(row: Model, verb: str = "change") -> str:
    """The address of a row's page, or of a verb on it."""
    name = f"{row._meta.app_label}_{row._meta.model_name}_{verb}"
    return reverse(f"admin:{name}", args=[quote(row.pk)])
