"""age encryption of exported files, by the optional package ``pyrage``.

Without it a request that asks for encryption is refused by name; nothing is ever written in
the clear instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.errors import InvalidRequest

SUFFIX = ".age"
MAX_RECIPIENTS = 50

_FIELD = "age_encryption_recipients"


def check_recipients(recipients: Sequence[str]) -> None:
    """Refuse what is not a list of age or SSH public keys.

    Raises:
        InvalidRequest: One is no public key, or this server cannot encrypt. (400)
    """
    if recipients:
        _parse(recipients)


def encrypt_file(source: Path, target: Path, recipients: Sequence[str]) -> None:
    """Write ``source`` as an age file that each of the recipients can open.

    Raises:
        InvalidRequest: As ``check_recipients``.
    """
    parsed = _parse(recipients)
    import pyrage

    pyrage.encrypt_file(str(source), str(target), parsed)


def _parse(recipients: Sequence[str]) -> list[Any]:
    if find_spec("pyrage") is None:
        raise InvalidRequest(
            f"{_FIELD}: this server cannot encrypt; its owner must install the package pyrage"
        )
    if len(recipients) > MAX_RECIPIENTS:
        raise InvalidRequest(f"{_FIELD}: {len(recipients)} recipients; at most {MAX_RECIPIENTS}")
    import pyrage

    parsed = []
    for index, recipient in enumerate(recipients):
        kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
        try:
            parsed.append(kind.Recipient.from_str(recipient))
        except pyrage.RecipientError as error:
            raise InvalidRequest(f"{_FIELD}[{index}]: not an age public key: {error}") from None
    return parsed
