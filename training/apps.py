"""Runs, checkpoints, and the work that a future asks for."""

from django.apps import AppConfig


class TrainingConfig(AppConfig):
    name = "training"
    verbose_name = "Training"
