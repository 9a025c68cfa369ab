"""age encryption of exported files, so that only their recipients can open them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyrage

from training.errors import InvalidRequest

SUFFIX = ".age"
MAX_RECIPIENTS = 50

_FIELD = "age_encryption_recipients"


def check_recipients(recipients: Sequence[str]) -> None:
    """Refuse anything other than a list of age or SSH public keys.

    Raises:
        InvalidRequest: An item is not a public key. (400)
    """
    if recipients:
        _parse(recipients)


def encrypt_file(source: Path, target: Path, recipients: Sequence[str]) -> None:
    """Write ``source`` as an age file that each recipient can open.

    Raises:
        InvalidRequest: As ``check_recipients``.
    """
    parsed = _parse(recipients)
    pyrage.encrypt_file(str(source), str(target), parsed)


def _parse(recipients: Sequence[str]) -> list[Any]:
    if len(recipients) > MAX_RECIPIENTS:
        raise InvalidRequest(f"{_FIELD}: {len(recipients)} recipients; at most {MAX_RECIPIENTS}")
    parsed = []
    for index, recipient in enumerate(recipients):
        kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
        try:
            parsed.append(kind.Recipient.from_str(recipient))
        except pyrage.RecipientError as error:
            raise InvalidRequest(f"{_FIELD}[{index}]: not an age public key: {error}") from None
    return parsed
