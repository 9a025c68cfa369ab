"""Sessions over HTTP: begin, live, end."""

from __future__ import annotations

from tests.conftest import ApiClient
from tinkerapi.api.sdk.views import service  # noqa: F401


def test_a_session_begins_lives_and_ends_with_its_first_reason(api: ApiClient) -> None:
    from training.models import Session

    body = api.post(
        "/api/v1/create_session",
        tags=["b", "a"],
        user_metadata={"k": 1},
        sdk_version="0.38.0",
        type="create_session",
    ).json()
    session_id = body["session_id"]
    assert body["type"] == "create_session"
    beat = api.post("/api/v1/session_heartbeat", session_id=session_id)
    assert (beat.status_code, beat.json()) == (200, {"type": "session_heartbeat"})
    for reason in ("success", "errored"):
        ended = api.post(
            f"/api/v1/sessions/{session_id}/finish", reason={"type": reason}, detail=None
        )
        assert ended.status_code == 204
    session = Session.objects.get(pk=session_id)
    assert (session.tags, session.finish_reason) == (["a", "b"], "success")
    assert api.post("/api/v1/session_heartbeat", session_id=session_id).status_code == 410
