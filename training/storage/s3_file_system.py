"""s3fs's file system, with the settings that our limits of time need."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from training.storage.s3_errors import BucketError, expected_errors

CONNECTIONS = 128
"""More than all transfers of a process use, so that none waits for another one's."""
CONNECT_SECONDS = 5
SILENCE_SECONDS = 20
"""Of the server, within an answer."""


def s3_file_system() -> Any:
    """A file system of the environment's credentials and address.

    Raises:
        BucketError: The package is missing.
    """
    try:
        import s3fs
    except ImportError as error:
        raise BucketError(
            "the package s3fs is missing; install the extra: pip install 'tinkerapi[s3]'",
            may_pass=False,
        ) from error
    is_elsewhere = any(os.environ.get(n) for n in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    files = s3fs.S3FileSystem(
        skip_instance_cache=True,  # its event loop does not survive a fork
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENCE_SECONDS,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            # Servers other than Amazon's rarely have a name for each bucket.
            "s3": {"addressing_style": "path" if is_elsewhere else "auto"},
        },
    )
    files.retries = 1  # ours are enough
    files.loop.call_soon_threadsafe(files.loop.set_exception_handler, _forgotten)
    return files


def _forgotten(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Errors of tasks that nobody awaits: aiohttp leaves some when a connection is closed, and the
    call itself has failed with an error that is reported."""
    if not isinstance(context.get("exception"), expected_errors()):
        loop.default_exception_handler(context)
