"""External weights for certain eyes only: age files that their recipients can open."""

from __future__ import annotations

from pathlib import Path

import pyrage
import pytest

from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from training.models import Checkpoint


def files(name: str, settings) -> dict[str, bytes]:
    directory = Path(settings.DATA_DIR) / Checkpoint.objects.get(name=name).directory
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_each_recipient_opens_every_file_and_nothing_is_left_in_the_clear(
    sdk: SdkClient, work: InProcessWorker, settings
) -> None:
    model_id = sdk.model()
    identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
    recipients = [str(identity.to_public()) for identity in identities]
    fields = {"model_id": model_id, "age_encryption_recipients": recipients}
    sdk.post("save_weights_external", model_id=model_id, seq_id=1, path="plain")
    saved = sdk.post("save_weights_external", **fields, seq_id=2, path="secret")
    work()

    plain, secret = files("plain", settings), files("secret", settings)
    assert set(secret) == {f"{name}.age" for name in plain}
    for name, content in plain.items():
        for identity in identities:
            assert pyrage.decrypt(secret[f"{name}.age"], [identity]) == content
    assert sdk.result(saved)["size_bytes"] == sum(len(content) for content in secret.values())
    folder = Path(settings.DATA_DIR) / "checkpoints"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("recipients", [["age1x"], ["ssh-ed25519 x"], "age1x", [1], ["a"] * 51])
def test_what_is_no_public_key_is_refused_by_name(
    sdk: SdkClient, work: InProcessWorker, recipients: object
) -> None:
    answer = sdk.post(
        "save_weights_external",
        model_id=sdk.model(),
        seq_id=1,
        path="a",
        age_encryption_recipients=recipients,
    )
    work()

    assert sdk.result(answer)["error"].startswith("age_encryption_recipients")
    assert sdk.result(answer)["category"] == "user"
