"""Which addresses are pages for a person's browser; all others are the API's."""

PREFIXES = ("/admin", "/docs", "/api/docs")


def is_page(path: str) -> bool:
    """Whether a browser asks for it, rather than a program."""
    return path.startswith(PREFIXES)
