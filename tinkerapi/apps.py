"""The Django project as an app: keys, commands, HTTP."""

from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_save


class TinkerapiConfig(AppConfig):
    name = "tinkerapi"
    verbose_name = "Access"

    def ready(self) -> None:
        post_save.connect(_audit_admin, sender="admin.LogEntry", dispatch_uid="audit")


def _audit_admin(instance: Any, created: bool, **kwargs: Any) -> None:
    """Copy the admin's history entries to the audit log.

    A signal, because the admin writes its history itself, even for other packages' pages.
    """
    from training.audit import audit_record

    if created:
        audit_record(
            "admin_action",
            actor_id=instance.user_id,
            owner_id=None,
            object=f"{instance.content_type}: {instance.object_repr}"[:300],
            message=instance.get_change_message()[:300],
        )
