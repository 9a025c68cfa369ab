"""The Dockerfile's own instructions without a Docker engine, in fresh Debian folders (chroots),
until the server that the image would start trains a step:

    apt-get install debootstrap
    python -m tests.deployment.image

As root; it takes some minutes, 6 GB of disk, and port 8000. Layers, namespaces and Docker's own
defaults are not tried.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deployment.debian import ENVIRONMENT, Debian, copy_checkout
from tests.deployment.proxied import FILES, is_listening
from tests.waiting import wait_for

PORT = 8000

TRAIN = """
import json, sys, urllib.request
body = {"model_id": "m", "loss_fn": "cross_entropy",
        "data": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
url = "http://127.0.0.1:8000/api/v1/forward_backward"
request = urllib.request.Request(url, json.dumps(body).encode(),
    {"Content-Type": "application/json", "X-API-Key": sys.argv[1]})
print(json.load(urllib.request.urlopen(request))["loss"])
"""


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, lines joined and comments dropped."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@dataclass
class Stage:
    """A stage of the image while it is made."""

    debian: Debian
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"
    settings: dict[str, Any] = field(default_factory=dict)


class Builder:
    """Carries out instructions; an unknown one is an error."""

    def __init__(self, work: Path, context: Path) -> None:
        self.work = work
        self.context = context
        self.base = Debian(work / "base")
        self.stages: dict[str, Stage] = {}
        self.stage: Stage

    def build(self, dockerfile: Path) -> Stage:
        self.base.make()
        for name, arguments in instructions(dockerfile):
            print(f"{name} {arguments[:90]}", flush=True)
            getattr(self, "do_" + name.lower())(arguments)
        return self.stage

    def do_from(self, arguments: str) -> None:
        image, *name = re.split(r"\s+AS\s+", arguments)
        assert image == "debian:bookworm-slim", image
        debian = Debian(self.work / f"stage{len(self.stages)}")
        debian.copy_from(self.base)
        self.stage = Stage(debian)
        self.stages[name[0] if name else ""] = self.stage

    def do_arg(self, arguments: str) -> None:
        name, _, value = arguments.partition("=")
        self.stage.environment[name] = value

    def do_env(self, arguments: str) -> None:
        path = {"PATH": ENVIRONMENT["PATH"], **self.stage.environment}["PATH"]
        for word in shlex.split(arguments):
            name, _, value = word.partition("=")
            self.stage.environment[name] = value.replace("$PATH", path)

    def do_run(self, arguments: str) -> None:
        with self.stage.debian.mounted():
            self.stage.debian.run(["/bin/sh", "-c", arguments], self.stage.environment)

    def do_copy(self, arguments: str) -> None:
        *sources, target = arguments.split()
        root = self.context
        if sources[0].startswith("--from="):
            root = self.stages[sources.pop(0).removeprefix("--from=")].debian.folder
        inside = self.stage.debian.inside(target)
        into = inside if target.endswith("/") else inside.parent
        into.mkdir(parents=True, exist_ok=True)
        for source in sources:
            path = root / source.lstrip("/")
            names = into / path.name if target.endswith("/") else inside
            subprocess.run(["cp", "-a", "--no-target-directory", str(path), str(names)], check=True)

    def do_user(self, arguments: str) -> None:
        self.stage.user = arguments

    def do_workdir(self, arguments: str) -> None:
        self.stage.folder = arguments

    def do_entrypoint(self, arguments: str) -> None:
        self.stage.settings["entrypoint"] = json.loads(arguments)

    def do_cmd(self, arguments: str) -> None:
        self.stage.settings["cmd"] = json.loads(arguments)

    def do_healthcheck(self, arguments: str) -> None:
        self.stage.settings["health"] = json.loads(arguments.partition(" CMD ")[2])

    def do_nothing(self, arguments: str) -> None:
        """It says something to Docker only."""

    do_volume = do_expose = do_stopsignal = do_nothing


def check(stage: Stage, log: Path) -> None:
    """Start what the image starts, ask as its health check does, train a step, stop it."""
    debian, place = stage.debian, {"user": stage.user, "folder": stage.folder}
    command = [*stage.settings["entrypoint"], *stage.settings["cmd"]]
    with debian.mounted(), log.open("wb") as output:
        server = subprocess.Popen(
            debian.command(command, **place),
            env={**ENVIRONMENT, **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: "ready after" in log.read_text() or server.poll() is not None, 600)
            text = log.read_text()
            assert server.poll() is None, f"the server has ended:\n{text[-3000:]}"
            debian.run(stage.settings["health"], stage.environment, **place)
            [key] = re.findall(r"tml-\S+", text)
            loss = debian.run(["python3", "-c", TRAIN, key], stage.environment, **place)
            print(f"a step was trained: loss {loss.strip()}")
        finally:
            server.terminate()
            server.wait(300)
        assert log.read_text().splitlines()[-1] == "stopped", log.read_text()


def main() -> None:
    assert not is_listening(PORT), f"something listens on port {PORT}"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        work = Path(name)
        copy_checkout(work / "context")
        stage = Builder(work, work / "context").build(FILES / "Dockerfile")
        check(stage, work / "server.log")
    print("Dockerfile: every instruction ran, and the server in it trains")


if __name__ == "__main__":
    main()
