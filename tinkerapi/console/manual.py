"""The manual at ``/docs/``: the Markdown files of ``tinkerapi/docs`` as pages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.safestring import SafeString, mark_safe
from django.views import View
from markdown import Markdown  # type: ignore[import-untyped]  # it ships no annotations

DOCS_DIR = Path(__file__).parents[1] / "docs"

FILE_FOLDERS = {name: DOCS_DIR / name for name in ("examples", "deployment")}
"""Folders whose files the pages name."""

READ_FIRST = (
    "quick-reference",
    "examples",
    "tinker-sdk",
    "openai",
    "losses",
    "curves",
    "text",
    "image-inputs",
    "checkpoints",
    "models",
    "sdk",
)
"""Pages for clients, in reading order; those for operators follow."""

_WIDE = re.compile("<(pre|table)>")
_LINK = re.compile(r'href="([\w-]+)\.md(#[^"]*)?"')


@cache
def titles() -> dict[str, str]:
    """File name without suffix to title: READ_FIRST first, then by name.

    Pages are looked up only here, so a name from an address never becomes a path.
    """
    paths = sorted(DOCS_DIR.glob("*.md"), key=lambda path: (_rank(path.stem), path.stem))
    return {path.stem: _title(path) for path in paths}


def _rank(name: str) -> int:
    return READ_FIRST.index(name) if name in READ_FIRST else len(READ_FIRST)


class IndexView(View):
    """List the pages of the manual."""

    group = "Documents"

    def get(self, request: HttpRequest) -> HttpResponse:
        return render(request, "docs/index.html", {"titles": titles()})


class PageView(View):
    """Show one page of the manual with its table of contents."""

    group = "Documents"

    def get(self, request: HttpRequest, name: str) -> HttpResponse:
        if name not in titles():
            raise Http404
        content, contents = _rendered(name)
        return render(
            request,
            "docs/page.html",
            {
                "titles": titles(),
                "name": name,
                "title": titles()[name],
                "content": content,
                "contents": contents,
            },
        )


class FileView(View):
    """Hand out a file that a page names, as the file that it is."""

    group = "Documents"

    def get(self, request: HttpRequest, folder: str, name: str) -> HttpResponse:
        if folder not in FILE_FOLDERS:
            raise Http404
        # Looked up among the files, so a name from an address never becomes a path.
        files = {path.name: path for path in FILE_FOLDERS[folder].iterdir() if path.is_file()}
        if name not in files:
            raise Http404
        text = files[name].read_text(encoding="utf-8")
        return HttpResponse(text, content_type="text/plain; charset=utf-8")


def _title(path: Path) -> str:
    first_line = path.read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("#").strip() or path.stem


@cache
def _rendered(name: str) -> tuple[SafeString, SafeString]:
    """HTML of the page and of its contents list; both from our own files, so safe."""
    source = (DOCS_DIR / f"{name}.md").read_text(encoding="utf-8")
    markdown = Markdown(
        extensions=["extra", "toc", "sane_lists"],
        extension_configs={"toc": {"toc_depth": "2-3", "permalink": "#"}},
    )
    # Pages link to each other by file name, which also works when they are read as files.
    html = _LINK.sub(r'href="\1\2"', markdown.convert(source))
    # What is wider than a phone is scrolled, also by the keyboard.
    html = _WIDE.sub(r'<\1 tabindex="0">', html)
    contents = getattr(markdown, "toc", "")
    return mark_safe(html), mark_safe(contents)  # noqa: S308
