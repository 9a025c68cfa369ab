"""The commands' output and exit codes."""

from __future__ import annotations

import math
import subprocess
import sys
from io import StringIO
from pathlib import Path

import psycopg
import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from pytest_django import Settings

from tests.base_models import base_model_configs
from tests.environment import command_environment
from tests.platform.model_folders import make_model_folder
from tests.server import free_port
from tinkerapi import cli
from tinkerapi.management.commands.up import Command
from tinkerapi.models import ApiKey
from tinkerapi.server.preflight import PreflightError, RunningServer, base_model_problem
from tinkerapi.services import api_key_verify, first_accounts_ensure
from training.base_models import base_models

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.django_db
def test_createapikey_prints_a_key_that_opens_the_door() -> None:
    user = User.objects.create_user("ada")
    output, remarks = StringIO(), StringIO()

    call_command(
        "createapikey", "ada", name="laptop", expires_days=7, stdout=output, stderr=remarks
    )

    found = api_key_verify(output.getvalue().strip())
    assert found is not None
    assert (found.user, found.name) == (user, "laptop")
    assert found.expires_at is not None
    assert f"it expires on {found.expires_at:%Y-%m-%d}," in remarks.getvalue()
    assert 6 <= (found.expires_at - found.created_at).days <= 7


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("username", "options", "sentence"),
    [
        ("nobody", {}, "there is no user 'nobody'; --create-user makes an ordinary one"),
        ("gone", {}, "user 'gone' is not active"),
        ("ada", {"expires_days": 0}, "--expires-days: expected 1 to 3650, got 0"),
        ("ada", {"expires_days": 10**11}, "--expires-days: expected 1 to 3650, got 100000000000"),
        ("gone", {"create_user": True}, "user 'gone' is not active"),
        ("no spaces", {"create_user": True}, "user 'no spaces': Enter a valid username"),
        ("", {"create_user": True}, "user '': This field cannot be blank"),
        ("n" * 151, {"create_user": True}, "has at most 150 characters"),
        ("new", {"create_user": True, "name": ""}, "--name: expected 1 to 100 characters"),
        ("ada", {"name": ""}, "--name: expected 1 to 100 characters, got 0"),
        ("ada", {"name": "n" * 101}, "--name: expected 1 to 100 characters, got 101"),
    ],
)
def test_createapikey_refuses_in_a_sentence_and_makes_no_key(
    username: str, options: dict[str, object], sentence: str
) -> None:
    User.objects.create_user("ada")
    User.objects.create_user("gone", is_active=False)

    with pytest.raises(CommandError, match=sentence):
        call_command("createapikey", username, **options)

    assert not ApiKey.objects.exists()
    assert User.objects.count() == 2


@pytest.mark.django_db
def test_createapikey_makes_an_ordinary_user_without_a_password_once() -> None:
    keys, remarks = [], StringIO()
    for _ in range(2):
        output = StringIO()
        call_command("createapikey", "bob", create_user=True, stdout=output, stderr=remarks)
        keys.append(api_key_verify(output.getvalue().strip()))

    bob = User.objects.get()
    assert [key.user for key in keys if key is not None] == [bob, bob]
    assert not bob.has_usable_password()
    said_of_the_key = "key of bob; it does not expire, and is shown only once:"
    assert remarks.getvalue().splitlines() == [
        "made user bob, without a password",
        said_of_the_key,
        said_of_the_key,
    ]
    assert (bob.is_staff, bob.is_superuser) == (False, False)


@pytest.mark.django_db
def test_the_first_accounts_are_made_once_and_their_secrets_shown_once() -> None:
    first = first_accounts_ensure()

    assert first.api_key is not None
    assert first.admin_password is not None
    key = api_key_verify(first.api_key)
    assert key is not None
    assert key.user.get_username() == "local"
    admin = User.objects.get(is_superuser=True)
    assert admin.check_password(first.admin_password)
    assert not User.objects.get(username="local").has_usable_password()

    second = first_accounts_ensure()
    assert (second.api_key, second.admin_password) == (None, None)
    assert User.objects.count() == 2
    assert ApiKey.objects.count() == 1


@pytest.mark.django_db
def test_a_superuser_of_another_name_is_enough() -> None:
    User.objects.create_superuser("ada", password="x")  # noqa: S106

    assert first_accounts_ensure().admin_password is None
    assert not User.objects.filter(username="admin").exists()


def test_a_command_says_in_a_sentence_that_no_server_runs(tmp_path: Path) -> None:
    answer = manage(tmp_path, "createapikey", "ada")

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == [
        f"data folder {tmp_path}",
        f"no server runs on {tmp_path}: start it with `python manage.py up`",
    ]


def test_a_connection_that_no_model_made_fails_in_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's first one holds its queue and is psycopg's own."""

    def fail(arguments: list[str]) -> None:
        raise psycopg.OperationalError("connection is bad: no such file")

    monkeypatch.setattr("django.core.management.execute_from_command_line", fail)

    with pytest.raises(SystemExit, match=r"does not answer|start it with `python manage.py up`"):
        cli.run(["manage.py", "check"])


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--host", "192.0.2.1"], {}, "cannot listen on 192.0.2.1 port "),
        ([], {"TINKERAPI_BASE_MODEL": "/nowhere/model"}, "there is no folder /nowhere/model"),
        ([], {"DATABASE_URL": "postgresql://127.0.0.1:9/x"}, "the database does not answer"),
        ([], {"TINKERAPI_DATA_DIR": "/dev/null/x"}, "the data folder /dev/null/x cannot be"),
    ],
)
def test_up_refuses_a_wrong_state_in_one_sentence(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    model = make_model_folder(tmp_path / "model")
    # The default port may be taken by a server that a developer has started.
    port = ("--port", str(free_port()))

    answer = manage(
        tmp_path, "up", *port, *arguments, **{"TINKERAPI_BASE_MODEL": str(model), **environment}
    )

    assert answer.returncode == 1
    assert sentence in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "names",
    [["/models/a", "/other/a"], ["some/model", "some/model"], ["some/model.1", "some/model-1"]],
)
def test_up_refuses_base_models_that_would_share_a_queue(
    settings: Settings, tmp_path: Path, names: list[str]
) -> None:
    settings.DATA_DIR = tmp_path
    settings.BASE_MODELS = base_model_configs(*names)
    command = Command()
    command.server = RunningServer(pid=1, host="127.0.0.1", port=0)

    with pytest.raises(PreflightError, match="needs a different name"), command._preflight():
        pytest.fail("one of the workers could never have its queue")


def test_the_folder_of_an_unknown_user_is_one_that_is_not_there(settings: Settings) -> None:
    settings.BASE_MODELS = base_model_configs("~no-such-user/model")

    assert str(base_model_problem(base_models()[0].folder)).startswith("there is no folder ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"port": 0}, "--port: expected 1 to 65535, got 0"),
        ({"port": -1}, "--port: expected 1 to 65535, got -1"),
        ({"port": 99999}, "--port: expected 1 to 65535, got 99999"),
        ({"port": 10**30}, f"--port: expected 1 to 65535, got {10**30}"),
        ({"max_restart_delay": -1.0}, "--max-restart-delay: expected 0.5 to 86400, got -1.0"),
        ({"max_restart_delay": 0.0}, "--max-restart-delay: expected 0.5 to 86400, got 0.0"),
        ({"max_restart_delay": math.nan}, "--max-restart-delay: expected 0.5 to 86400, got nan"),
        ({"max_restart_delay": math.inf}, "--max-restart-delay: expected 0.5 to 86400, got inf"),
    ],
)
def test_up_refuses_a_number_that_is_out_of_range(
    settings: Settings, tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    settings.DATA_DIR = tmp_path / "new"

    with pytest.raises(CommandError) as caught:
        call_command("up", **options)

    assert str(caught.value) == sentence
    assert not settings.DATA_DIR.exists(), "refused before anything is made"


@pytest.mark.parametrize(
    ("host", "required"),
    [("127.0.0.1", "0"), ("::1", "0"), ("0.0.0.0", "1"), ("::", "1")],  # noqa: S104
)
def test_up_demands_keys_wherever_others_can_reach_it(
    settings: Settings, tmp_path: Path, host: str, required: str
) -> None:
    settings.DATA_DIR = tmp_path
    settings.BASE_MODELS = base_model_configs("some/model")  # not there yet, so it will be fetched
    output = StringIO()
    command = Command(stdout=output)
    command.server = RunningServer(pid=1, host=host, port=0)

    with command._preflight() as environment:
        assert environment["TINKERAPI_REQUIRE_API_KEY"] == required
        assert environment["TINKERAPI_DATA_DIR"] == str(tmp_path)
        assert len(environment["TINKERAPI_SECRET_KEY"]) >= 50
    said = output.getvalue()
    assert ("every request needs a key" in said) is (required == "1")
    assert ("acts as the user local" in said) is (required == "0")


def manage(data_dir: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run manage.py with the project's own settings and no server of the test's."""
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=command_environment(data_dir, environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
