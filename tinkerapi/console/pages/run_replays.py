"""The buttons of a run's page that repeat its log in a new run: replay, fork."""

from __future__ import annotations

import secrets
from typing import Any

from django import forms
from django.contrib.admin.utils import unquote
from django.http import HttpRequest, HttpResponse
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminIntegerFieldWidget as NumberInput

from tinkerapi.console.kit.console_admin import ConsoleAdmin, redirect, verb
from tinkerapi.console.kit.display import page_url
from training.models import Run
from training.overview import run_find_one
from training.services import run_fork, run_replay


class WishForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """A form with a key of its own, so that sending it twice does the thing once."""

    key = forms.CharField(
        max_length=64, widget=forms.HiddenInput, initial=lambda: secrets.token_hex(16)
    )

    @property
    def wish(self) -> str:
        """The idempotency key of the request."""
        return f"console-{self.cleaned_data['key']}"


class ForkForm(WishForm):
    """At which step the new run begins."""

    step = forms.IntegerField(min_value=1, widget=NumberInput, label="After step")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me = self.request.user
        owner_id = None if me.is_superuser else me.pk
        run = run_find_one(unquote(str(self.object_id)), owner_id=owner_id)
        steps = run.step if run is not None else 0
        self.fields["step"].initial = steps
        self.fields["step"].help_text = f"1 to {steps}" if steps else "It has made no step yet."


class RunReplays(ConsoleAdmin):
    """The actions, for the run's owner and for superusers."""

    def has_replay_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        """Both need a live run."""
        return self.matches(request, object_id, state=Run.RunState.READY)

    @verb(
        "Replay",
        permission="replay",
        icon="replay",
        question="Replay this run?",
        answer="Replay it",
        explanation="A new run repeats all its requests in the same order, and then both are "
        "compared: losses, gradient norms, weights, optimizer state. The new run's page says "
        "whether they are equal, or where they differ. It takes as long as the training took.",
        form_class=WishForm,
    )
    def replay(self, request: HttpRequest, form: WishForm, object_id: str) -> HttpResponse:
        run = self.row(request, object_id)
        copy = self.attempt(
            request,
            run,
            "is replayed in this new run",
            lambda: run_replay(run=run, actor_id=request.user.pk, key=form.wish),
        )
        return redirect(request, page_url(copy or run))

    @verb(
        "Fork",
        permission="replay",
        icon="fork_right",
        question="Fork this run?",
        answer="Fork it",
        explanation="A new run begins with this one's weights and optimizer state after a step: "
        "from a checkpoint of that step, or else by repeating the requests up to it. Its state is "
        "saved as a checkpoint too, with which SDK clients can begin.",
        form_class=ForkForm,
    )
    def fork(self, request: HttpRequest, form: ForkForm, object_id: str) -> HttpResponse:
        run = self.row(request, object_id)
        step = form.cleaned_data["step"]
        copy = self.attempt(
            request,
            run,
            f"is forked after step {step} into this new run",
            lambda: run_fork(run=run, step=step, actor_id=request.user.pk, key=form.wish),
        )
        return redirect(request, page_url(copy or run))
