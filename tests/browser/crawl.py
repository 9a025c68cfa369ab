"""Every kind of page of the console, found by following its links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlsplit

from tests.browser.chromium import Browser

_KINDS = {"tab", "group", "sample"}
"""Parameters that choose another page and not other rows."""

_NO_PAGES = re.compile(r"format=|/(logout|download|export|trace|autocomplete)(/|$)|^/admin/r/")
_LINKS = """
return [...document.querySelectorAll("a[href]:not([hx-get])")]
  .filter((one) => one.origin === location.origin && one.pathname.startsWith("/admin/"))
  .map((one) => one.pathname + one.search);
"""


def kind_of(address: str) -> tuple[str, ...]:
    """What two pages of one kind have in common: not their rows' ids."""
    parts = urlsplit(address)
    path = re.sub(
        r"(/admin/\w+/\w+/)(?!add/|compare/|storage/|playground/)[^/]+/", r"\1*/", parts.path
    )
    chosen = {
        f"{name}={value}" if name == "tab" else name
        for name, value in parse_qsl(parts.query)
        if name in _KINDS
    }
    return path, *sorted(chosen - {"tab=overview"})


def pages(browser: Browser, *first: str) -> Iterator[str]:
    """Open one page of each kind, and give its address while it is open.

    Links are followed from the dashboard and from these addresses, which are opened in any case.
    """
    waiting = ["/admin/", *first]
    seen = set(map(kind_of, waiting))
    while waiting:
        browser.open(address := waiting.pop(0))
        yield address
        for link in browser.driver.execute_script(_LINKS):
            if kind_of(link) not in seen and not _NO_PAGES.search(link):
                seen.add(kind_of(link))
                waiting.append(link)
