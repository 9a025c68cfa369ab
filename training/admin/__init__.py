"""The admin pages of runs and what belongs to them, and futures as the requests of runs."""

from training.admin.audit import AuditEventAdmin
from training.admin.checkpoints import CheckpointAdmin, SnapshotAdmin
from training.admin.requests import RequestAdmin
from training.admin.runs import RunAdmin
from training.admin.sessions import SamplingSessionAdmin, SessionAdmin

__all__ = [
    "AuditEventAdmin",
    "CheckpointAdmin",
    "RequestAdmin",
    "RunAdmin",
    "SamplingSessionAdmin",
    "SessionAdmin",
    "SnapshotAdmin",
]
