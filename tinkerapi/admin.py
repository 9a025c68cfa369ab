"""Lets Django's admin find the pages in ``tinkerapi.console.pages``."""

from tinkerapi.console.pages import (
    api_keys,
    audit,
    checkpoints,
    futures,
    lanes,
    runs,
    sessions,
    task_queue,
    usage,
    users,
    webhook,
    workers,
)

__all__ = [
    "api_keys",
    "audit",
    "checkpoints",
    "futures",
    "lanes",
    "runs",
    "sessions",
    "task_queue",
    "usage",
    "users",
    "webhook",
    "workers",
]
