"""The SDK's ``get_tokenizer()`` finds a folder of the base model's name, and asks no hub then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import make_tokenizer

SCRIPT = """
import sys
from tinker.lib.public_interfaces.sampling_client import _load_tokenizer_from_model_info
name = sys.argv[1]  # what get_info says of both
print(_load_tokenizer_from_model_info(name, name).encode("hi"))
"""


@pytest.mark.parametrize("name", ["SomeOrg/Model-1", "a-folder"])
def test_a_link_where_the_client_runs_is_all_that_the_sdk_needs(tmp_path: Path, name: str) -> None:
    make_tokenizer().save_pretrained(tmp_path / "models" / "served")
    link = tmp_path / "client" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "models" / "served")

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        cwd=tmp_path / "client",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )

    assert done.stdout.strip() == str(make_tokenizer().encode("hi")), done.stderr
