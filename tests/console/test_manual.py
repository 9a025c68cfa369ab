"""GET /docs/: the Markdown files as pages, and nothing else of the disk."""

from __future__ import annotations

import pytest
from django.test import Client

from tinkerapi.console import manual


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A manual of one page."""
    (tmp_path / "first-steps.md").write_text(
        "# First steps\n\n## Train\n\n[more](next-steps.md#two)\n\n"
        "```python\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    monkeypatch.setattr(manual, "DOCS_DIR", tmp_path)
    for cached in (manual.titles, manual._rendered):
        cached.cache_clear()
    yield
    for cached in (manual.titles, manual._rendered):
        cached.cache_clear()


def test_the_manual_lists_its_pages_by_title(docs, client):
    page = client.get("/docs/").content.decode()

    assert '<a href="/docs/first-steps">First steps</a>' in page


def test_a_page_is_rendered_with_its_contents_list(docs, client):
    page = client.get("/docs/first-steps").content.decode()

    assert '<h2 id="train">' in page
    assert '<a href="#train">Train</a>' in page
    assert '<table tabindex="0">' in page
    assert 'href="next-steps#two"' in page
    assert '<pre tabindex="0">' in page


@pytest.mark.parametrize("name", ["nothing", "..", "..%2fsettings", "first-steps.md"])
def test_other_names_are_a_404(docs, client, name):
    assert client.get(f"/docs/{name}").status_code == 404


@pytest.mark.parametrize(
    ("page", "folder", "name"),
    [("examples", "examples", "rl.py"), ("proxy", "deployment", "Caddyfile")],
)
def test_a_file_that_a_page_names_is_handed_out_as_a_text(client, page, folder, name):
    assert f'href="{folder}/{name}"' in client.get(f"/docs/{page}").content.decode()
    file = client.get(f"/docs/{folder}/{name}")
    assert file["Content-Type"] == "text/plain; charset=utf-8"
    assert file.content == (manual.FILE_FOLDERS[folder] / name).read_bytes()
    for other in ("nothing.py", "..", "../quick-reference.md", "..%2f..%2fsettings.py"):
        assert client.get(f"/docs/{folder}/{other}").status_code == 404


@pytest.mark.parametrize("path", ["images/dashboard.png", "architecture/x", "../settings.py"])
def test_other_folders_are_a_404(client, path):
    assert client.get(f"/docs/{path}").status_code == 404


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("/admin", "/admin/"),
        ("/docs", "/docs/"),
        ("/docs/first-steps/", "/docs/first-steps"),
        ("/api/docs/", "/api/docs"),
    ],
)
def test_a_slash_that_is_missing_or_too_many_is_forgiven_a_browser(docs, client, typed, meant):
    answer = client.get(typed)

    assert (answer.status_code, answer["Location"]) == (302, meant)


@pytest.mark.parametrize("path", ["/docs", "/docs/", "/docs/first-steps", "/admin"])
def test_a_page_that_is_only_read_answers_a_post_with_405(docs, path):
    assert Client(enforce_csrf_checks=True).post(path).status_code == 405


def test_what_a_newcomer_reads_first_is_listed_first():
    names = list(manual.titles())

    assert names[: len(manual.READ_FIRST)] == list(manual.READ_FIRST)
    assert names[len(manual.READ_FIRST) :] == [
        "adapters",
        "architecture",
        "benchmarks",
        "containers",
        "deployment",
        "monitoring",
        "operations",
        "proxy",
        "several-hosts",
        "storage",
        "vllm",
    ]
