"""Installs a checkout's packages, so that the first command is the only one needed.

``manage.py`` calls this before anything else, so only the standard library may be imported
here. The requirements are read from ``pyproject.toml``. In an active virtual environment it is
installed there; elsewhere in ``.venv`` beside ``manage.py``, which is made if it is missing, and
the command continues in it. If everything is installed already, nothing is printed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

CPU_TORCH = "torch==2.13.0"
"""Installed first if there is no NVIDIA GPU, so that everybody starts from the same build."""

_NO_INSTALL = "TINKERAPI_NO_INSTALL"
_JUST_INSTALLED = "_TINKERAPI_JUST_INSTALLED"
"""Set for the command that continues after an installation; it must not install again."""

_INTERRUPTED = ".tinkerapi-installing"
"""File in the environment during an installation; a later command that finds it continues."""


def ensure_installed(arguments: Sequence[str]) -> None:
    """Return if all packages are there; otherwise install them and start this command again.

    Args:
        arguments: ``sys.argv`` of manage.py. ``test`` also needs the ``dev`` extra.

    Raises:
        SystemExit: Installing is not allowed, or it failed; the message says what to do.
    """
    extra = "dev" if arguments[1:2] == ["test"] else ""
    missing = missing_packages(required_packages(extra))
    just_installed = os.environ.pop(_JUST_INSTALLED, "")
    if not missing and not _marker().exists():
        return
    target = "." + (f"[{extra}]" if extra else "")
    commands = [["install", "--no-compile", "--editable", target]]
    if not _has_nvidia_gpu():
        commands.insert(0, ["install", "--no-compile", CPU_TORCH])
    if just_installed:
        sys.exit(f"pip reports success, but {_listed(missing)} are missing")
    if os.environ.get(_NO_INSTALL, "").strip().lower() not in ("", "0", "false", "no", "off"):
        python, lines = Path(sys.executable), []
        if not in_environment():
            python = CHECKOUT / ".venv" / "bin" / "python"
            lines = [f"  {sys.executable} -m venv {CHECKOUT / '.venv'}"]
        lines += [f"  {python} -m pip {' '.join(command)}" for command in commands]
        lines.insert(0, f"{_NO_INSTALL} is set and {_listed(missing)} are missing. To install:")
        sys.exit("\n".join(lines))
    if not in_environment():
        _go_on(_made_environment(), arguments)
    what = (
        f"packages that are missing ({len(missing)})"
        if missing
        else "what an interrupted installation left out"
    )
    _say(f"installing {what} in {sys.prefix}; {_NO_INSTALL}=1 would only say so")
    _install(commands)
    _go_on(Path(sys.executable), arguments, just_installed=True)


def required_packages(extra: str) -> list[str]:
    """The requirements in ``pyproject.toml``, with those of an extra if one is named."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    more = project["optional-dependencies"][extra] if extra else []
    return [*project["dependencies"], *more]


def missing_packages(requirements: Sequence[str]) -> list[str]:
    """The ``requirements`` that are missing here, or installed in a wrong version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it is a requirement too, so none is installed
        return list(requirements)
    missing = []
    for line in requirements:
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(line)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(line)
    return missing


def in_environment() -> bool:
    """Whether this Python belongs to a virtual or conda environment."""
    return sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix


def _made_environment() -> Path:
    """The Python of ``.venv``, which is made if it is missing or incomplete."""
    folder = CHECKOUT / ".venv"
    python = folder / "bin" / "python"
    if not _works(python):
        _say(f"making the virtual environment {folder}")
        done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)  # noqa: S603
        if done.returncode or not _works(python):
            sys.exit(
                f"no virtual environment could be made in {folder}; on Debian and Ubuntu it needs "
                "the package python3-venv"
            )
    return python


def _works(python: Path) -> bool:
    """Whether this Python starts and has pip."""
    if not python.exists():
        return False
    check = [str(python), "-c", "import pip"]
    return subprocess.run(check, check=False, capture_output=True).returncode == 0  # noqa: S603


def _pip(arguments: Sequence[str]) -> None:
    options = ["--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", *arguments, *options]
    status = subprocess.run(command, cwd=CHECKOUT, check=False).returncode  # noqa: S603
    if status:
        sys.exit(f"pip failed with status {status}; the same command tries again")


def _install(commands: Sequence[Sequence[str]]) -> None:
    """Run pip's commands here, after any other command that is installing here.

    The marker file remains if the installation is interrupted.
    """
    marker = _marker()
    was_interrupted = marker.exists()
    with marker.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists():
            return  # the other command has installed everything
        if was_interrupted:
            _remove_half_installed()
        for number, command in enumerate(commands, 1):
            _say(f"{number} of {len(commands)}: pip {' '.join(command)}")
            _pip(command)
        marker.unlink()


def _remove_half_installed() -> None:
    """Remove the metadata of packages whose installation was interrupted.

    pip treats a package as installed as soon as its metadata exists. It writes RECORD last.
    """
    for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not (folder / "RECORD").exists():
            shutil.rmtree(folder)


def _marker() -> Path:
    return Path(sys.prefix) / _INTERRUPTED


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _go_on(python: Path, arguments: Sequence[str], *, just_installed: bool = False) -> None:
    """Replace this process by the same command under ``python``."""
    environment = {**os.environ, **({_JUST_INSTALLED: "1"} if just_installed else {})}
    sys.stdout.flush()
    os.execve(python, [str(python), *arguments], environment)  # noqa: S606


def _listed(requirements: Sequence[str], most: int = 4) -> str:
    """The first few, and how many more there are."""
    more = len(requirements) - most
    return ", ".join(requirements[:most]) + (f" and {more} more" if more > 0 else "")


def _say(line: str) -> None:
    sys.stdout.write(f"install   {line}\n")
    sys.stdout.flush()
