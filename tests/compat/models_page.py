"""``tinkerapi/docs/models.md``: what was judged of each family, as a page of the manual.

    python -m tests.compat.models_page

Writes the page from ``model_families.json``, as the judge itself does (``model_families``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("model_families.json")
PAGE = Path(__file__).parents[2] / "tinkerapi" / "docs" / "models.md"

Families = Mapping[str, Mapping[str, Any]]

_INTRODUCTION = """\
# Models

Which families of models this server computes, by transformers' `model_type` (in a folder's
`config.json`). Another folder is refused at the start of its worker, with a sentence: every start
compares the engine with the unmodified model, and does not serve what differs.

This page is made by `python -m tests.compat.model_families`. It makes each causal family tiny and
random, with windows and chunks that its sequences cross, trains and samples with it as clients do,
and compares with stock transformers {transformers} and peft in float32, one sequence at a time. Of
{total} families, right: {right}, refused: {refused}, not made or not checked so: {rest},
wrong: {wrong}.

With real weights: SmolLM2-135M-Instruct is the default model, and most tests of text and
benchmarks use it. Gemma 3 270M, most of whose layers see 512 tokens, learnt in three steps to
repeat a password from 1,200 tokens before, and repeats one that it was never trained on; stock
peft gives the sampled tokens the same log-probabilities to 1e-6
(`python -m tests.compat.long_recital`, results beside it).
"""

_COLUMNS = """
## Served

- **Layout**: `packed` puts sequences beside each other without padding; `padded` uses the family's
  own attention, masks and caches, and is slower.
- **Experts**: adapters reach the experts that transformers stacks in one parameter.
- **Images**: prompts and training data may hold images.
- **Verified on**: log-probabilities and gradients of training, log-probabilities of prompts and of
  samples, and the export in stock peft, loaded and merged.
- **Worst difference**: the largest one, in nats; as a share of the largest logit for exports, and
  of its length for the gradient. These models are steep: float32 explains 2e-4.

| Family | Layout | Experts | Images | Verified on | Worst difference |
|---|---|---|---|---|---|
"""

_VISION = """
## Models with a vision tower

Made tiny with a processor of their own. Where images are read,
`tests/engine/test_vision_families.py` compares training, scoring and sampling with stock
transformers and peft. The others serve text.

| Family | Layout | Images | Why not |
|---|---|---|---|
"""

_WRONG = """
## Wrong

What of the family is wrong; the rest is right.

| Family | Wrong |
|---|---|
"""

_REFUSED = """
## Refused

| Family | Why |
|---|---|
"""

_REST = """
## Not judged

| Family | Why |
|---|---|
"""


def models_page(results: Mapping[str, Any]) -> str:
    """The page for the judge's results."""
    families: Families = results["families"]
    counts = results["counts"]
    right, refused, wrong = (counts.get(name, 0) for name in ("right", "refused", "wrong"))
    text = _INTRODUCTION.format(
        transformers=results["versions"]["transformers"],
        total=len(families),
        right=right,
        refused=refused,
        wrong=wrong,
        rest=len(families) - right - refused - wrong,
    )
    text += _COLUMNS + "".join(_served_row(n, answer) for n, answer in _of(families, "right"))
    text += _VISION + "".join(_vision_row(n, a) for n, a in results["vision"].items())
    for heading, verdicts in (
        (_WRONG, ("wrong",)),
        (_REFUSED, ("refused",)),
        (_REST, ("not made", "not checked")),
    ):
        rows = [_reason_row(n, a) for verdict in verdicts for n, a in _of(families, verdict)]
        if rows:
            text += heading + "".join(sorted(rows))
    return text


def _of(families: Families, verdict: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((n, answer) for n, answer in families.items() if answer["verdict"] == verdict)


def _served_row(name: str, answer: Mapping[str, Any]) -> str:
    differences = answer["differences"]
    verified = ", ".join(differences)
    worst = max(differences.values())
    flags = ["yes" if answer.get(flag) else "" for flag in ("experts", "images")]
    cells = [f"`{name}`", answer["layout"], *flags, verified, f"{worst:.1e}"]
    return f"| {' | '.join(cells)} |\n"


def _vision_row(name: str, answer: Mapping[str, Any]) -> str:
    images = "yes" if answer.get("images") else ""
    return f"| `{name}` | {answer.get('layout', '')} | {images} | {_reason(answer)} |\n"


def _reason_row(name: str, answer: Mapping[str, Any]) -> str:
    return f"| `{name}` | {_reason(answer)} |\n"


def _reason(answer: Mapping[str, Any]) -> str:
    return " ".join(str(answer.get("why", "")).split()).replace("|", "\\|")


def main() -> None:
    PAGE.write_text(models_page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
