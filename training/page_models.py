"""Rows that exist for people to read: curves, rollouts, tokens. No result depends on them.

``training.models`` has them too, as Django requires.
"""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models
from django.utils import timezone


class ClientMetrics(models.Model):
    """Numbers that a client measured at one step of a run, such as its reward."""

    run = models.ForeignKey("training.Run", on_delete=models.CASCADE, related_name="client_metrics")
    step = models.BigIntegerField()
    metrics = models.JSONField()
    """Name to number; null for one that is not finite."""
    created_at = models.DateTimeField(default=timezone.now)
    """When the step's first metrics arrived."""

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "step"], name="client_metrics_run_step"),
        ]

    def __str__(self) -> str:
        return f"metrics of {self.run_id} at step {self.step}"


class SampledStep(models.Model):
    """Sums over all sequences that a run's owner sampled from the weights of one of its steps."""

    run = models.ForeignKey("training.Run", on_delete=models.CASCADE, related_name="sampled_steps")
    step = models.IntegerField()
    sequences = models.BigIntegerField()
    tokens = models.BigIntegerField()
    stopped_by_length = models.BigIntegerField()
    logprob_sum = models.FloatField()
    """Of all sampled tokens, in nats."""

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "step"], name="sampled_step_run_step"),
        ]

    def __str__(self) -> str:
        return f"samples of {self.run_id} at step {self.step}"


class Rollout(models.Model):
    """One sampled sequence of a run, as text that people can read and search.

    A copy for the console: it is cut to a length, and deleted with the request's bodies.
    """

    run = models.ForeignKey("training.Run", on_delete=models.CASCADE, related_name="rollouts")
    step = models.IntegerField()
    """The step of the weights that it was sampled from."""
    request_id = models.CharField(max_length=39)
    number = models.IntegerField()
    """Among the sequences of its request."""
    prompt_digest = models.BinaryField(max_length=16)
    """Of the prompt's tokens: sequences of one step with the same prompt form a group."""
    sequence_digest = models.BinaryField(max_length=16)
    """Of the prompt's and the sampled tokens: finds the sequence in a later training request."""
    prompt = models.TextField(blank=True)
    completion = models.TextField(blank=True)
    prompt_tokens = models.IntegerField()
    tokens = models.IntegerField()
    stop_reason = models.CharField(max_length=20)
    logprob_mean = models.FloatField(null=True)
    """Mean over the sampled tokens, in nats; None without any."""
    advantage = models.FloatField(null=True)
    """Mean over its tokens in the training request that used it; None until one does."""
    trained_by = models.CharField(max_length=39, blank=True, default="")
    """The id of that request."""
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["request_id", "number"], name="rollout_of_request"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["run", "-id"], name="rollout_newest"),
            models.Index(fields=["run", "step", "prompt_digest"], name="rollout_group"),
            # A training request looks for its sequences.
            models.Index(fields=["run", "sequence_digest"], name="rollout_sequence"),
        ]

    def __str__(self) -> str:
        return f"{self.request_id}-{self.number}"


class RenderedData(models.Model):
    """The tokens that the worker made of a training request's text and images, for people."""

    run = models.ForeignKey("training.Run", on_delete=models.CASCADE, related_name="+")
    request_id = models.CharField(primary_key=True, max_length=39)
    data = models.BinaryField()
    """A list of ``model_input`` and ``loss_fn_inputs``, one for each example
    (``futures.payload``)."""
    created_at = models.DateTimeField(default=timezone.now, db_index=True)

    def __str__(self) -> str:
        return f"tokens of {self.request_id}"


class Vocabulary(models.Model):
    """The bytes of a base model's tokens, so that pages can show tokens without its tokenizer."""

    queue = models.CharField(primary_key=True, max_length=100)
    """The base model's engine queue."""
    fingerprint = models.CharField(max_length=64)
    """Changes if the tokens do."""
    data = models.BinaryField()
    """A list of each token's bytes, by id (``futures.payload``)."""

    def __str__(self) -> str:
        return f"vocabulary of {self.queue}"


class CountedHour(models.Model):
    """How many requests were submitted in one hour that is over, by owner and final state.

    All of them were final when they were counted, so the numbers do not change any more.
    """

    hour = models.DateTimeField(primary_key=True)
    """Its beginning, in UTC."""
    counts = models.JSONField()
    """Owner's id, as text, to state to number."""
    totals = models.JSONField()
    """State to the number of all owners together: a sum over years reads no owner's."""

    def __str__(self) -> str:
        return f"requests of {self.hour:%Y-%m-%d %H}:00"


class DailyUsage(models.Model):
    """What an owner's requests used on one day, by run and kind of work.

    The commit that completes a request adds to it, so it is exact at any time, and stays when
    requests are pruned.
    """

    class Work(models.TextChoices):
        TRAINING = "training"
        """Tokens of forward passes, with or without backward."""
        PREFILL = "prefill"
        """Tokens of the prompts of samples."""
        SAMPLING = "sampling"
        """Sampled tokens."""
        OTHER = "other"
        """Time of optimizer steps, saves, loads and so on; no tokens."""

    day = models.DateField()
    """In UTC, of the completion."""
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, db_index=False)
    run_id = models.CharField(max_length=200, blank=True)
    """Also of samples of the run's saved weights; empty: of the base model, or of another's."""
    work = models.CharField(max_length=10, choices=Work.choices)
    requests = models.BigIntegerField()
    tokens = models.BigIntegerField()
    seconds = models.FloatField()
    """Of a worker: its busy time is shared among the requests of a batch by their size."""

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["owner", "day", "run_id", "work"], name="daily_usage_once"
            ),
        ]
        indexes: ClassVar = [
            # The totals of all owners.
            models.Index(fields=["day"], name="daily_usage_day"),
        ]

    def __str__(self) -> str:
        return f"{self.work} of {self.run_id or 'no run'} on {self.day}"
