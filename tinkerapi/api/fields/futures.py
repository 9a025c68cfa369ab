"""The field that names a future."""

from __future__ import annotations

from tinkerapi.api.fields.field import Text

REQUEST_ID = Text(
    description="The id that the submission answered.",
    required=True,
    max_length=100,
    example="future_0123456789abcdef0123456789abcdef",
)
