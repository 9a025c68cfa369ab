"""``docs/models.md`` is what the judge found, and the judge found nothing wrong."""

from __future__ import annotations

import json

import transformers

from tests.compat.models_page import PAGE, RESULTS, models_page

FOUND = json.loads(RESULTS.read_text())


def test_the_page_is_the_one_that_the_results_give():
    assert PAGE.read_text() == models_page(FOUND), "run python -m tests.compat.models_page"


def test_the_results_are_of_the_installed_transformers():
    assert FOUND["versions"]["transformers"] == transformers.__version__


def test_no_family_is_wrong_and_every_refusal_says_why():
    for name, answer in FOUND["families"].items():
        assert answer["verdict"] in ("right", "refused", "not made", "not checked"), name
        if answer["verdict"] == "right":
            assert max(answer["differences"].values()) <= 1e-4, name
            assert answer["layout"] in ("packed", "padded"), name
        else:
            assert answer["why"], name
