"""Distinguishes pages for a browser from the API's addresses."""

PREFIXES = ("/admin", "/docs", "/api/docs", "/favicon.ico")


def is_page(path: str) -> bool:
    """Whether the path is a page for a browser."""
    return path.startswith(PREFIXES)
