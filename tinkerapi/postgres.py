"""An embedded PostgreSQL in the data folder, for people who have no database at hand."""

from pathlib import Path


def embedded_database(data_dir: Path) -> dict[str, object]:
    """Django's settings for the embedded Postgres of this data folder."""
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "tinkerapi",
        "USER": "postgres",
        "HOST": str(data_dir / "pgrun"),
    }
