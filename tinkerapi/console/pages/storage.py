"""What is stored: bytes by kind, user, run and table."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.admin.sites import AdminSite
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse

from tinkerapi.console.kit.display import changelist_url, link, link_to, list_link
from training.models import Checkpoint
from training.storage_quota import storage_use
from training.stored_bytes import bytes_by_kind, bytes_by_owner, bytes_by_run, bytes_by_table

ROWS = 30
TABLES = 8

Context = dict[str, Any]


def storage_page(request: HttpRequest, site: AdminSite) -> HttpResponse:
    """Of this person's objects; for superusers, of everything."""
    owner_id = None if request.user.is_superuser else request.user.pk
    tables = bytes_by_table(limit=TABLES) if owner_id is None else []
    context = {
        **site.each_context(request),
        "title": "Storage",
        "kinds": {
            "headers": ["Kind", "Number", "Size"],
            "rows": [
                [kind, f"{number:,}", filesizeformat(size)]
                for kind, number, size in bytes_by_kind(owner_id)
            ],
        },
        "tables": tables
        and {
            "headers": ["Table", "Size"],
            "rows": [[name, filesizeformat(size)] for name, size in tables],
        },
        "database_title": "Database",
        "users": _users() if owner_id is None else None,
        "runs": _runs(owner_id),
        "quota": _quota(owner_id),
        "checkpoints_url": changelist_url(Checkpoint),
        "policy": _policy(),
    }
    return TemplateResponse(request, "admin/training/checkpoint/storage.html", context)


def _users() -> Context:
    rows = [
        [
            link_to(User, owner_id, name),
            list_link(Checkpoint, f"{files.count:,}", run__owner__id__exact=owner_id),
            filesizeformat(files.checkpoints),
            filesizeformat(files.snapshots),
            filesizeformat(files.total),
        ]
        for owner_id, name, files in bytes_by_owner(limit=ROWS)
    ]
    return {"headers": ["User", "Checkpoints", "Their size", "Snapshots", "Together"], "rows": rows}


def _runs(owner_id: int | None) -> Context:
    rows = [
        [
            link(run, run.shown_title),
            *([run.owner.get_username()] if owner_id is None else []),
            "removed" if run.deleted_at else run.shown_state,
            list_link(Checkpoint, f"{files.count:,}", q=run.pk),
            filesizeformat(files.checkpoints),
            filesizeformat(files.snapshots),
            filesizeformat(files.total),
        ]
        for run, files in bytes_by_run(owner_id, limit=ROWS)
    ]
    first = ["Run", *(["User"] if owner_id is None else []), "State"]
    return {
        "headers": [*first, "Checkpoints", "Their size", "Snapshots", "Together"],
        "rows": rows,
    }


def _quota(owner_id: int | None) -> Context | None:
    """What this person uses of the limit of one user, if there is one."""
    limit: int = settings.USER_STORAGE_BYTES
    if owner_id is None or not limit:
        return None
    use = storage_use(owner_id)
    return {
        "percent": min(100, round(100 * use.total / limit)),
        "title": f"{use}; of {filesizeformat(limit)}",
    }


def _policy() -> str:
    """The settings that delete checkpoints, in a sentence each."""
    days, keep = settings.CHECKPOINT_TTL_DAYS, settings.KEEP_CHECKPOINTS
    said = []
    if days:
        said.append(f"A checkpoint saved without a time to live is deleted after {days} days.")
    if keep:
        said.append(f"A run keeps its newest {keep} checkpoints of each kind, and published ones.")
    return " ".join(said)
