"""Every request about weights and sessions gets an error by name, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sdk.conftest import SdkClient
from tinkerapi.api.sdk.views import sessions, weights

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.sampled_from(
        ["tinker://m/weights/a", "tinker://m/external_weights/a", "tinker:///", "\0", "..", "a/b"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["type", "reasons"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)

CALLS: Mapping[str, Any] = {
    "save_weights": {"model_id": None, "seq_id": None, **weights.SaveWeightsView.fields},
    "save_weights_for_sampler": {
        "model_id": None,
        "seq_id": None,
        **weights.SaveWeightsForSamplerView.fields,
    },
    "save_weights_external": {
        "model_id": None,
        "seq_id": None,
        **weights.SaveWeightsExternalView.fields,
    },
    "load_weights": {
        "model_id": None,
        "seq_id": None,
        **weights.LoadWeightsView.creation_fields,
    },
    "weights_info": weights.WeightsInfoView.fields,
    "copy_weights": weights.CopyWeightsView.fields,
    "sessions/search": {"cursor": None, **sessions.SessionSearchView.fields},
}


@pytest.mark.parametrize("path", CALLS)
def test_no_body_is_answered_with_a_traceback(sdk: SdkClient, path: str) -> None:
    model_id = sdk.model()
    names = sorted(CALLS[path])

    @settings(
        max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        body=st.dictionaries(st.sampled_from(names), JSON_VALUES, max_size=len(names)),
        named=st.booleans(),
        seq_id=st.integers(1, 2**31),
    )
    def send(body: dict[str, Any], named: bool, seq_id: int) -> None:
        if named and "model_id" in names:
            body |= {"model_id": model_id, "seq_id": seq_id}
        answer = sdk.post(path, **body)
        assert answer.status_code < 500, (body, answer.content)
        assert answer.status_code != 409  # the client would send it again for minutes
        if answer.status_code >= 400:
            assert answer.json()["detail"]

    send()
