"""Import rules that a linter cannot check, tested in a process that loads the modules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TINKERAPI = Path(__file__).resolve().parent.parent / "tinkerapi"


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh process holds after running a statement."""
    script = (
        "import os; os.environ['DJANGO_SETTINGS_MODULE'] = 'tests.settings'\n"
        f"{statement}\n"
        "import sys; print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def web_modules() -> set[str]:
    return modules_after(
        "from tinkerapi.asgi import application\n"
        "from django.urls import get_resolver; get_resolver().url_patterns"
    )


@pytest.mark.parametrize("module", ["torch", "transformers", "peft"])
def test_the_web_process_loads_no(web_modules: set[str], module: str) -> None:
    assert module not in web_modules


def test_the_web_process_serves_the_views(web_modules: set[str]) -> None:
    # Guards the test above: had the views not been loaded, it would say nothing.
    loaded = {"rest_framework", "drf_spectacular", "futures", "training", "tinkerapi.console.pages"}
    assert loaded <= web_modules


def test_a_process_that_serves_no_page_loads_none() -> None:
    modules = modules_after("import django; django.setup()")
    assert "tinkerapi.console.pages" not in modules
    assert "futures.models" in modules


def test_the_engine_loads_peft_only_to_export() -> None:
    modules = modules_after("from training.engine.torch.trainer import TorchTrainer")
    assert "peft" not in modules
    assert "transformers" in modules


def test_the_fake_engine_needs_no_torch() -> None:
    assert "torch" not in modules_after("from training.engine.fake.engine import fake_engine")


@pytest.mark.parametrize("room", ["api", "console"])
def test_what_a_browser_or_a_client_asks_goes_through_selectors_and_services(room: str) -> None:
    by_hand = [
        f"{path.relative_to(TINKERAPI)}: {line.strip()}"
        for path in (TINKERAPI / room).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\.objects\b", line)
    ]
    assert by_hand == []
