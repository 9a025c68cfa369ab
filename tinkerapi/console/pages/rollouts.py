"""The rollouts tab of a run: what was sampled, found by its words, read in groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from django.http import HttpRequest

from tinkerapi.console.kit.display import page_url, tab_url
from tinkerapi.console.kit.parameters import number_of
from tinkerapi.console.pages.run_data import thumbnails, tokens_json
from training.inspection import sample_inspect
from training.models import Rollout, Run
from training.rollout_listing import rollout_find, rollout_group, rollout_page

PAGE_ROWS = 50
MAX_WORDS_LENGTH = 200
PROMPT_END = 110
"""Characters of a prompt in the list."""

_DIGEST = re.compile("[0-9a-f]{32}")
_MARKS = re.compile(r"<\|[^|<>]{1,40}\|>")


def rollouts_tab(request: HttpRequest, run: Run) -> dict[str, Any]:
    """A page of rollouts, or the group or the single sequence that the address names."""
    number = number_of(request, "number")
    if (request_id := request.GET.get("sample", "").replace("\0", "")) and number is not None:
        return _sequence(run, request_id, number)
    digest, step = request.GET.get("group", ""), number_of(request, "step")
    if _DIGEST.fullmatch(digest) and step is not None:
        return _group(run, step, bytes.fromhex(digest))
    words = request.GET.get("q", "").replace("\0", "")[:MAX_WORDS_LENGTH]
    before = number_of(request, "before")
    page = rollout_page(run, words=words, step=step, before=before, limit=PAGE_ROWS)
    kept = {"q": words, **({} if step is None else {"step": step})}
    return {
        "mode": "list",
        "words": words,
        "step": step,
        "rows": _rows(run, page.rows),
        "is_first": before is None,
        "first_url": _url(run, **kept),
        "older_url": None if page.before is None else _url(run, **kept, before=page.before),
    }


def _group(run: Run, step: int, digest: bytes) -> dict[str, Any]:
    rollouts = rollout_group(run, step=step, prompt_digest=digest)
    advantages = [row.advantage for row in rollouts if row.advantage is not None]
    return {
        "mode": "group",
        "step": step,
        "prompt": rollouts[0].prompt if rollouts else "",
        "rows": _rows(run, rollouts),
        "trained": len(advantages),
        "list_url": _url(run),
    }


def _sequence(run: Run, request_id: str, number: int) -> dict[str, Any]:
    found = rollout_find(run, request_id=request_id, number=number)
    if found is None:
        return {"mode": "missing", "list_url": _url(run)}
    row, future = found
    view = sample_inspect(run, future, number=number)
    return {
        "mode": "sequence",
        "row": _rows(run, [row])[0],
        "view": view,
        "tokens": None if view is None else tokens_json(view),
        "thumbnails": [] if view is None else thumbnails(view),
        "request_url": page_url(future),
        "list_url": _url(run),
    }


def _rows(run: Run, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Rollouts for a table, with links to their group, their tokens and their training. The first
    of several neighbours with one prompt shows it."""
    groups = [(row.step, bytes(row.prompt_digest)) for row in rollouts]
    return [
        {
            "rollout": row,
            "prompt": _end(row.prompt) if not index or groups[index] != groups[index - 1] else "",
            "tone": _tone(row.advantage),
            "group_url": tab_url(
                run, "rollouts", group=bytes(row.prompt_digest).hex(), step=row.step
            ),
            "tokens_url": _url(run, sample=row.request_id, number=row.number),
            "trained_url": row.trained_by and tab_url(run, "data", request=row.trained_by),
        }
        for index, row in enumerate(rollouts)
    ]


def _end(text: str) -> str:
    """The end of a prompt without its template's marks, because many begin with the same words."""
    plain = " ".join(_MARKS.sub(" ", text).split())
    return plain if len(plain) <= PROMPT_END else f"…{plain[-PROMPT_END:]}"


def _tone(advantage: float | None) -> str:
    """The colour of an advantage."""
    if advantage is None:
        return "none"
    return "good" if advantage > 0 else "bad" if advantage < 0 else "zero"


def _url(run: Run, **parameters: object) -> str:
    return tab_url(run, "rollouts", **parameters)
