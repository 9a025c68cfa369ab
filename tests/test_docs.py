"""The README is true: it names every endpoint, setting and command, and nothing that was
removed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.conf import settings
from django.core.management import get_commands

from tinkerapi.api.quickref.render import loss_fns_description
from tinkerapi.api.quickref.urls import urlpatterns

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "tinkerapi" / "settings.py").read_text()

VARIABLES = sorted(set(re.findall(r'"(TINKERAPI_[A-Z_]+|DATABASE_URL)"', SETTINGS)))
SET_BY_UP = ("TINKERAPI_ROLE", "TINKERAPI_WATCHDOG_FD")
COMMANDS = sorted(
    name for name, app in get_commands().items() if app in ("tinkerapi", "training", "futures")
)
ROUTES = sorted("/" + str(pattern.pattern) for pattern in urlpatterns)


def documented(prefix: str) -> list[str]:
    """First cells of the README's tables that look like ``prefix...``."""
    return re.findall(rf"^\| `({prefix}[A-Za-z0-9_/<>:]*)`", README, flags=re.MULTILINE)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_setting_is_in_the_configuration_table(name: str) -> None:
    assert name in documented("") or name in SET_BY_UP


def test_the_configuration_table_has_no_setting_that_is_gone() -> None:
    assert set(documented("TINKERAPI_")) <= set(VARIABLES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README or f"manage.py {name}" in README


@pytest.mark.parametrize("route", ROUTES)
def test_every_endpoint_is_in_the_readme(route: str) -> None:
    assert f"`{route}`" in README or f" {route}`" in README


def test_the_readme_lists_the_loss_functions_that_the_server_lists() -> None:
    (listed,) = re.findall(
        r"^\| `GET /list_loss_functions` \| (.+) \|$", README, flags=re.MULTILINE
    )
    assert listed.split(", ") == list(loss_fns_description())


def test_the_readme_names_no_file_that_is_gone() -> None:
    paths = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_defaults_in_the_configuration_table_are_the_defaults() -> None:
    rows = re.findall(r"^\| `TINKERAPI_(\w+)` \| `?([^|`]+)`? \|", README, flags=re.MULTILINE)
    numbers = {name: int(value) for name, value in rows if value.strip().isdigit()}
    assert len(numbers) > 5
    for name, value in numbers.items():
        assert getattr(settings, name) == value, name


def test_the_manual_names_no_test_that_is_gone() -> None:
    pages = (ROOT / "tinkerapi" / "docs").glob("*.md")
    named = {name for page in pages for name in re.findall(r"\btest_\w+\.py", page.read_text())}
    assert named
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


ARCHITECTURE = (ROOT / "tinkerapi" / "docs" / "architecture.md").read_text()


def test_the_architecture_names_no_file_that_is_gone() -> None:
    """A shorter name follows a longer one in its row, and is below a folder of that."""
    for row in re.findall(r"^\| .+ \|$", ARCHITECTURE, flags=re.MULTILINE):
        folders = [ROOT]
        for named in re.findall(r"`([\w/]+(?:/|\.py|\.md))`", row):
            found = next((path for f in folders if (path := f / named).exists()), None)
            assert found is not None, (named, row)
            folders += [f for f in (found, *found.parents) if f.is_relative_to(ROOT)]
