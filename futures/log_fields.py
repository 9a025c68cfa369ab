"""What a log record is about, beside its message: for logs that a machine reads.

``tinkerapi.server.logs`` writes them; in a log for people the message says it.
"""

from __future__ import annotations

from typing import Any

_of_process: dict[str, Any] = {}


def log_fields_of_process(**fields: Any) -> None:
    """Add fields to all later records of this process, such as its worker's epoch."""
    _of_process.update(fields)


def about(**fields: Any) -> dict[str, Any]:
    """``extra=about(run=run.id)``: the fields of one record. None stands for an unknown value."""
    return {"about": {name: value for name, value in fields.items() if value is not None}}


def log_fields(record: object) -> dict[str, Any]:
    """All fields of a record: those of the process, then its own."""
    return {**_of_process, **getattr(record, "about", {})}
