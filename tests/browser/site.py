"""A server with two people, each with their own runs: what the browser tests look at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import requests

from tests.browser.chromium import Browser
from tests.server import Server
from tests.waiting import LONG_SECONDS

PASSWORD = "seven green bottles"  # noqa: S105
ANSWER = "pineapple"
"""The answer that every run is trained to give."""


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]


@dataclass(frozen=True)
class Person:
    """Somebody with a password for the console and a key for the API."""

    server: Server
    name: str
    password: str
    key: str
    is_superuser: bool

    def send(self, path: str, /, **body: Any) -> Any:
        """An API call of this person's; the answer must be a success."""
        return self._send(path, body, {})

    def send_as_sdk(self, path: str, /, **body: Any) -> Any:
        """The same in the SDK's dialect, which never waits."""
        return self._send(f"/api/v1/{path}", body, {"X-Stainless-Package-Version": "0.38.0"})

    def _send(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        answer = requests.post(
            f"{self.server.url}{path}",
            json=body,
            headers={"X-API-Key": self.key, **headers},
            timeout=LONG_SECONDS,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def train(self, model_id: str, steps: int = 1) -> float:
        """Optimizer steps of a run; the loss before the last one."""
        for _ in range(steps):
            passed = self.send(
                "/api/v1/forward_backward", model_id=model_id, data=[conversation("The word?")]
            )
            self.send("/api/v1/optim_step", model_id=model_id, adam_params={"learning_rate": 2e-2})
        return float(passed["loss"])

    def save(self, model_id: str, name: str) -> None:
        self.send("/api/v1/save_weights_for_sampler", model_id=model_id, name=name)

    def log_in(self, browser: Browser) -> None:
        browser.open("/admin/")
        browser.fill("input[name=username]", self.name)
        browser.submit("input[name=password]", self.password)
        browser.until(lambda: browser.path == "/admin/", "dashboard")


def superuser(server: Server) -> Person:
    """The first user, whose password ``up`` has shown, with a key."""
    found = re.search(r"login (\w+), password (\S+)", server.log())
    assert found is not None, server.log()
    name, password = found.groups()
    return Person(server, name, password, make_key(server, name), is_superuser=True)


def user(server: Server, name: str) -> Person:
    """A new ordinary user with a key, who cannot log in before an invitation."""
    return Person(server, name, PASSWORD, make_key(server, name, "--create-user"), False)


def make_key(server: Server, name: str, *options: str) -> str:
    made = server.manage("createapikey", name, "--name", f"laptop of {name}", *options)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def invite(host: Browser, guest: Browser, person: Person) -> None:
    """A superuser makes a link in the console, with which the guest sets a password."""
    host.open(f"/admin/auth/user/?q={person.name}")
    host.click("#result_list a", person.name)
    host.press("Invite")
    host.click("#modal-content button", "Make a link")
    link = host.find("#invitation").text
    guest.driver.get(link)
    guest.fill("input[name=password1]", PASSWORD)
    guest.fill("input[name=password2]", PASSWORD)
    guest.click("button", "Set the password")
    guest.find("#login-form")


@dataclass(frozen=True)
class Traces:
    """What a person has done before a browser looks at it."""

    run: str
    other: str
    failed: str
    """The request id of one that failed."""
    waiting: str
    """The request id of one that waits for a number that never comes."""
    waiting_run: str


def train(person: Person) -> Traces:
    """Two runs with samples, rewards and checkpoints, a failure, and a request that waits."""
    run, other = f"{person.name}-poems", f"{person.name}-prose"
    for model_id, rank in ((run, 4), (other, 8)):
        person.send("/api/v1/add_lora", model_id=model_id, rank=rank)
        person.train(model_id, steps=3)
        person.save(model_id, "first")
        person.send(f"/api/v1/runs/{model_id}/metrics", step=1, metrics={"reward": 0.25})
    person.train(run)
    person.save(run, "second")
    person.send(
        "/api/v1/sample",
        model_id=run,
        messages=conversation("The word?")[:1],
        num_samples=2,
        sampling_params={"max_tokens": 12, "seed": 1},
    )
    waiting_run, waiting = _waiting(person)
    return Traces(run, other, _failed(person, run), waiting, waiting_run)


def _failed(person: Person, run: str) -> str:
    """A token that no base model of the tests has."""
    datum = {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 999_999]}}
    found = person.send("/api/v1/forward_backward_async", model_id=run, data=[datum])
    return str(found["request_id"])


def _waiting(person: Person) -> tuple[str, str]:
    """A request of the SDK whose predecessors never arrive: its run and its id."""
    session = person.send_as_sdk("create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
    made = person.send_as_sdk(
        "create_model",
        session_id=session["session_id"],
        model_seq_id=0,
        base_model="tiny",
        lora_config={"rank": 4},
        optimizer_config={"type": "adamw"},
        user_metadata={"name": f"the novel of {person.name}"},
        type="create_model",
    )
    step = person.send_as_sdk(
        "optim_step", model_id=made["model_id"], seq_id=9, adam_params={"learning_rate": 1e-3}
    )
    return str(made["model_id"]), str(step["request_id"])
