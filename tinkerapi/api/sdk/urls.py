"""The routes that only the tinker SDK uses, below ``/api/v1/``; those that both dialects have
are in ``tinkerapi.api.urls``, where ``by_dialect`` chooses.

No route ends in a slash, and nothing redirects: a client would send its POST as a GET.
"""

from django.urls import URLPattern, path

from tinkerapi.api.sdk.views import service

urlpatterns: list[URLPattern] = [
    # Service
    path("create_session", service.CreateSessionView.as_view()),
    path("session_heartbeat", service.SessionHeartbeatView.as_view()),
    path("sessions/<str:session_id>/finish", service.SessionFinishView.as_view()),
    # Models
    # Futures
    # Sampling
    # Weights
    # Listings and checkpoints
]
