"""Durable futures; generic, knows nothing about training."""

from django.apps import AppConfig


class FuturesConfig(AppConfig):
    name = "futures"
    verbose_name = "Futures"
