"""``manage.py watch``: runs and their steps as lines of a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command

from tinkerapi.console.terminal import BARS, sparkline
from tinkerapi.management.commands import watch
from training.models import ClientMetrics, Run

Traces = Callable[..., SimpleNamespace]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(*arguments: str, out: io.StringIO | None = None) -> str:
    out = out or io.StringIO()
    call_command("watch", *arguments, stdout=out)
    return out.getvalue()


def test_every_step_is_a_line_with_its_figures(trained: Traces, superuser: User) -> None:
    traces = trained(superuser)
    ClientMetrics.objects.create(run=traces.run, step=1, metrics={"reward": 0.25})

    output = watched(traces.run.pk, "--once")

    loss = traces.forward_backward.summary["loss"]
    [line] = output.splitlines()
    assert line.startswith(f"step 1  loss {loss:.4g}  ")
    assert line.endswith("reward 0.25")


def test_without_a_run_the_newest_are_listed(trained: Traces, superuser: User) -> None:
    assert "There are no runs yet" in watched("--once")
    first, second = trained(superuser), trained(superuser)

    lines = watched("--once").splitlines()

    assert lines[0].split()[:3] == ["run", "owner", "steps"]
    assert [line.split()[0] for line in lines[1:]] == [second.run.name, first.run.name]
    assert f"{second.forward_backward.summary['loss']:.4g}" in lines[1]


def test_a_terminal_is_drawn_again_in_place_until_the_run_ends(
    trained: Traces, superuser: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(superuser).run

    def ends(seconds: float) -> None:
        assert seconds == 2.0
        Run.objects.filter(pk=run.pk).update(state="deleted", deleted_at=run.created_at)

    monkeypatch.setattr(watch.time, "sleep", ends)

    output = watched(run.name, out=Terminal())

    first, again, second = output.partition("\x1b[")
    assert again
    assert "1 step" in first
    assert second.startswith(f"{len(first.splitlines())}F\x1b[J")
    assert "It was removed after 1 step" in second


def test_a_clients_text_does_not_move_the_cursor(trained: Traces, superuser: User) -> None:
    run = trained(superuser).run
    Run.objects.filter(pk=run.pk).update(title="\x1b[2Jgone\nnext")
    ClientMetrics.objects.create(run=run, step=1, metrics={"\x1b[1Areward": 1.0})

    for arguments in (("--once",), (run.pk, "--once")):
        assert "\x1b" not in watched(*arguments, out=Terminal())


def test_a_run_that_is_not_there_is_named(db: None) -> None:
    with pytest.raises(CommandError, match="no run 'nothing'"):
        watched("nothing")


@pytest.mark.parametrize("wrong", ["0", "nan", "soon", "1e9"])
def test_an_impossible_interval_is_refused(db: None, wrong: str) -> None:
    with pytest.raises(CommandError, match="expected seconds from"):
        watched("--once", f"--every={wrong}")


def test_a_curves_form_is_scaled_to_its_range() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == BARS
    assert sparkline([3.0, 3.0]) == BARS[0] * 2
    assert len(sparkline([float(number) for number in range(1000)])) == 60


def test_a_line_of_numbers_at_the_ends_of_float64_has_a_form() -> None:
    """A client's own metric may be any of them, and another person watches the run."""
    assert sparkline([-1.7e308, 1.7e308]) == BARS[0] + BARS[-1]
    assert sparkline([1.7e308] * 200) == BARS[0] * 60
    assert sparkline([0.0, 5e-324]) == BARS[0] + BARS[-1]
    assert sparkline([0.0, 0.0]) == BARS[0] * 2
