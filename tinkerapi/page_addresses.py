"""Distinguishes pages for a browser from the API's addresses."""

PREFIXES = ("/admin", "/docs", "/api/docs", "/favicon.ico")


def is_page(path: str) -> bool:
    """Whether the path is a page for a browser."""
    return path.startswith(PREFIXES)


def is_front_page(path: str, accept: str) -> bool:
    """Whether a browser asks for the server's own address, where other clients get JSON.

    Args:
        accept: The request's Accept header.
    """
    return path == "/" and "text/html" in accept
