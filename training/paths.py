"""``tinker://<run>/<what it is>/<name>``: parsed and built in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass

from training.errors import InvalidRequest

SEGMENTS = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
"""Checkpoint kind to the middle segment of its path."""

_KINDS = {segment: kind for kind, segment in SEGMENTS.items()}
_RUN_ID = re.compile(r"run_[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def check_name(value: str, *, field: str) -> str:
    """Check and return a name for a path or a file name; an error names the field.

    A name has at most 128 letters, digits, ``. _ : -`` and begins with a letter or digit, so
    ``..`` and separators are impossible.

    Raises:
        InvalidRequest: It is not allowed. (400)
    """
    if not _NAME.fullmatch(value):
        raise InvalidRequest(
            f"{field}: {value[:60]!r} is not a name; use up to 128 letters, digits, '.', '_', "
            "':' or '-', beginning with a letter or digit"
        )
    return value


def check_run_name(value: str, *, field: str) -> str:
    """Like ``check_name``, for a run's name. It must not look like a run's id, because paths would
    confuse the two.

    Raises:
        InvalidRequest: It is not allowed. (400)
    """
    if _RUN_ID.fullmatch(value):
        raise InvalidRequest(
            f"{field}: {value!r} is how this server names runs by itself; choose another name"
        )
    return check_name(value, field=field)


@dataclass(frozen=True)
class TinkerPath:
    """The address of a checkpoint."""

    run: str
    """The run's name in its owner's clients."""
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{SEGMENTS[self.kind]}/{self.name}"

    @classmethod
    def parse(cls, value: str, *, field: str = "path") -> TinkerPath:
        """The path's parts.

        Raises:
            InvalidRequest: It is not of the form above. (400)
        """
        scheme, _, rest = value.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in _KINDS:
            raise InvalidRequest(
                f"{field}: {value[:120]!r} is not a checkpoint path; expected "
                "tinker://<model_id>/weights/<name>, .../sampler_weights/<name> or "
                ".../external_weights/<name>"
            )
        run, segment, name = parts
        return cls(check_name(run, field=field), _KINDS[segment], check_name(name, field=field))

    @classmethod
    def of_checkpoint_id(cls, run: str, checkpoint_id: str) -> TinkerPath:
        """The path of ``<what it is>/<name>`` below a run.

        Raises:
            InvalidRequest: It is not of that form. (400)
        """
        return cls.parse(f"tinker://{run}/{checkpoint_id}", field="checkpoint_id")

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's id within its run."""
        return f"{SEGMENTS[self.kind]}/{self.name}"
