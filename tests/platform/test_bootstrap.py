"""The first command of a checkout installs missing packages, once, and continues.

A toy checkout stands for the real one: our own manage.py and bootstrap, a project that needs two
small packages, and wheels of both in a folder in place of an index.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import packaging
import pytest

from tinkerapi.server import bootstrap

ROOT = Path(__file__).resolve().parents[2]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "toy"
version = "1.0"
dependencies = ["packaging>=1", "pineapple>=2"]

[project.optional-dependencies]
dev = ["coconut"]
"""

# An editable installation of nothing, for pip asks the project to build one.
BACKEND = """
import zipfile

def _metadata(folder):
    return folder + "/toy-1.0.dist-info"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel_directory + "/" + name, "w") as wheel:
        wheel.writestr("toy-1.0.dist-info/METADATA", "\\n".join([
            "Metadata-Version: 2.1", "Name: toy", "Version: 1.0",
            "Requires-Dist: packaging>=1", "Requires-Dist: pineapple>=2",
            "Provides-Extra: dev", "Requires-Dist: coconut; extra == 'dev'", ""]))
        wheel.writestr("toy-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\\nGenerator: toy\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    return name
"""

CLI = """
import sys
def run(arguments):
    import pineapple
    print("inside", sys.prefix, *arguments[1:])
"""


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip, made once: a copy of it is one too."""
    folder = tmp_path_factory.mktemp("environment") / "empty"
    subprocess.run([outside(), "-m", "venv", str(folder)], check=True)
    return folder


@pytest.fixture
def checkout(bare_checkout: Path, empty_environment: Path) -> Path:
    """A checkout with an environment that lacks everything."""
    shutil.copytree(empty_environment, bare_checkout / ".venv", symlinks=True)
    return bare_checkout


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "tinkerapi" / "server").mkdir(parents=True)
    shutil.copy(ROOT / "manage.py", folder)
    shutil.copy(bootstrap.__file__, folder / "tinkerapi" / "server")
    (folder / "tinkerapi" / "cli.py").write_text(CLI)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    files = {
        f"packaging/{path.name}": path.read_text()
        for path in Path(packaging.__file__).parent.glob("*.py")
    }
    make_wheel(wheels, "packaging", "99", files)
    for name in ("pineapple", "coconut"):
        make_wheel(wheels, name, "2.0", {f"{name}.py": ""})
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")  # so that no torch is installed first
    (tools / "nvidia-smi").chmod(0o755)
    return folder


def make_wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> None:
    about = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{path},sha256={digest.decode()},{len(text.encode())}")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in contents.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{about}/RECORD", "\n".join([*record, f"{about}/RECORD,,", ""]))


def environment(checkout: Path, **more: str) -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))
    }
    return {
        **kept,
        "PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(checkout.parent / "wheels"),
        **more,
    }


def outside() -> str:
    """A Python that is in no environment, as a bare machine's is."""
    return str(Path(sys.base_prefix) / "bin" / "python3")


def manage(checkout: Path, *arguments: str, python: str = "", **more: str) -> str:
    done = subprocess.run(
        [python or outside(), "manage.py", *arguments],
        cwd=checkout,
        env=environment(checkout, **more),
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout


def test_the_first_command_of_a_bare_clone_installs_and_goes_on_inside(
    bare_checkout: Path,
) -> None:
    output = manage(bare_checkout, "up", "--port", "1")

    assert f"making the virtual environment {bare_checkout}/.venv" in output
    assert "1 of 1: pip install --no-compile --editable ." in output
    assert output.endswith(f"inside {bare_checkout}/.venv up --port 1\n")


def test_a_second_command_says_nothing_and_installs_nothing(checkout: Path) -> None:
    manage(checkout, "up")

    output = manage(checkout, "up", PIP_FIND_LINKS="/nowhere")

    assert output == f"inside {checkout}/.venv up\n"


def test_only_the_tests_need_the_dev_extra(checkout: Path) -> None:
    manage(checkout, "up")

    output = manage(checkout, "test", "-k", "some")

    assert "pip install --no-compile --editable .[dev]" in output
    assert "packages that are missing (1)" in output
    assert output.endswith(f"inside {checkout}/.venv test -k some\n")


def test_an_active_environment_is_installed_into_and_no_other_is_made(
    bare_checkout: Path, empty_environment: Path
) -> None:
    own = shutil.copytree(empty_environment, bare_checkout.parent / "own", symlinks=True)

    output = manage(bare_checkout, "up", python=str(own / "bin" / "python"))

    assert output.endswith(f"inside {own} up\n")
    assert not (bare_checkout / ".venv").exists()


def test_with_no_install_the_commands_are_said_and_nothing_is_made(bare_checkout: Path) -> None:
    output = manage(bare_checkout, "up", TINKERAPI_NO_INSTALL="1")

    assert "pineapple>=2 are missing. To install:" in output
    assert f"-m venv {bare_checkout}/.venv" in output
    assert f"{bare_checkout}/.venv/bin/python -m pip install --no-compile --editable ." in output
    assert not (bare_checkout / ".venv").exists()


def test_a_failed_installation_is_said_and_tried_again(checkout: Path) -> None:
    failed = manage(checkout, "up", PIP_FIND_LINKS="/nowhere")
    output = manage(checkout, "up")

    assert "pip failed with status 1; the same command tries again" in failed
    assert "inside" not in failed
    assert output.endswith(f"inside {checkout}/.venv up\n")


def test_an_interrupted_installation_is_continued(checkout: Path) -> None:
    """Also where it was interrupted after a package's metadata and before its modules."""
    manage(checkout, "up")
    site = next((checkout / ".venv" / "lib").glob("python*/site-packages"))
    (site / "pineapple.py").unlink()
    (site / "pineapple-2.0.dist-info" / "RECORD").unlink()
    (checkout / ".venv" / ".tinkerapi-installing").touch()

    output = manage(checkout, "up")

    assert "what an interrupted installation left out" in output
    assert output.endswith(f"inside {checkout}/.venv up\n")
    assert manage(checkout, "up") == f"inside {checkout}/.venv up\n"


def test_two_first_commands_at_once_install_once(checkout: Path) -> None:
    both = [
        subprocess.Popen(
            [outside(), "manage.py", "up"],
            cwd=checkout,
            env=environment(checkout),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]

    outputs = [process.communicate()[0] for process in both]

    assert [output.splitlines()[-1] for output in outputs] == [f"inside {checkout}/.venv up"] * 2
    assert sum("1 of 1: pip" in output for output in outputs) == 1


def test_packages_of_another_version_are_missing() -> None:
    wanted = ["packaging>=1", "packaging<1", "no-such-package"]

    assert bootstrap.missing_packages(wanted) == ["packaging<1", "no-such-package"]


def test_this_checkout_has_what_its_tests_need() -> None:
    assert bootstrap.missing_packages(bootstrap.required_packages("dev")) == []
