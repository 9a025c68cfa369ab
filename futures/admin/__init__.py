"""The admin pages of futures, lanes and workers."""

from futures.admin.futures import FutureAdmin
from futures.admin.lanes import LaneAdmin
from futures.admin.workers import WorkerAdmin

__all__ = ["FutureAdmin", "LaneAdmin", "WorkerAdmin"]
