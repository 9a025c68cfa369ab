"""The ``tinkerapi`` command: our commands by group, and nothing of Django's."""

from __future__ import annotations

import os
import sys
from importlib import metadata

import pytest
from django.core.management import get_commands
from pytest_django import Settings

from tinkerapi import cli

OURS = {name for name, app in get_commands().items() if app in ("tinkerapi", "training", "futures")}


def say(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tinkerapi", *arguments])
    cli.main()


def test_every_command_of_ours_is_in_one_group() -> None:
    grouped = [name for commands in cli.GROUPS.values() for name in commands]

    assert sorted(grouped) == sorted(OURS - {"test"})  # which needs a checkout


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)])
def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    say(monkeypatch, *arguments)

    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for commands in cli.GROUPS.values() for name in commands)


def test_the_version_is_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "--version")

    assert capsys.readouterr().out == f"tinkerapi {metadata.version('tinkerapi')}\n"


def test_a_command_of_djangos_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="there is no command 'shell'"):
        say(monkeypatch, "shell")


def test_a_misspelt_command_gets_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="did you mean 'doctor'"):
        say(monkeypatch, "docter")


@pytest.mark.parametrize("arguments", [("doctor", "--help"), ("help", "doctor")])
def test_a_command_says_how_it_is_called_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        say(monkeypatch, *arguments)

    assert capsys.readouterr().out.startswith("usage: tinkerapi doctor")


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    say(monkeypatch, "completion", shell)

    assert (OURS - {"test"}) <= set(
        capsys.readouterr()
        .out.replace("(", " ")
        .replace(")", " ")
        .replace("'", " ")
        .replace('"', " ")
        .split()
    )


@pytest.mark.parametrize("option", [["--config", "a.toml"], ["--config=a.toml"]])
def test_every_command_takes_a_configuration_file(
    monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    """The settings read it from the environment, before the command sees its arguments."""
    monkeypatch.setenv("TINKERAPI_CONFIG", "")
    seen: list[str] = []
    monkeypatch.setattr("django.core.management.execute_from_command_line", seen.extend)

    say(monkeypatch, "doctor", *option, "--verbosity", "2")

    assert seen == ["tinkerapi", "doctor", "--verbosity", "2"]
    assert os.environ["TINKERAPI_CONFIG"] == "a.toml"


def test_a_command_says_on_which_data_folder_it_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Settings
) -> None:
    monkeypatch.setattr("django.core.management.execute_from_command_line", lambda arguments: None)

    say(monkeypatch, "doctor")

    assert capsys.readouterr().err == f"data folder {settings.DATA_DIR}\n"


def test_a_part_of_up_does_not_say_the_data_folder_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("django.core.management.execute_from_command_line", lambda arguments: None)

    say(monkeypatch, "preparemodel", "some/model")

    assert capsys.readouterr().err == ""
