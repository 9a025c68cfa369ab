"""The errors of S3 calls as sentences for the operator."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache
from typing import Any

CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthFailure",
)
OTHER_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "301")
FULL = (
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
    "InsufficientStorage",
    "507",
)
"""Of servers other than Amazon's; of none of them does another try soon help."""
SKEWED = ("RequestTimeTooSkewed", "RequestExpired")
DENIED = ("AccessDenied", "403", "AllAccessDisabled")


class ObjectMissing(Exception):
    """There is no such object, or it is not what was written."""


class BucketError(Exception):
    """A call failed. The text is for the operator."""

    def __init__(self, text: str, *, code: str = "", may_pass: bool = True) -> None:
        super().__init__(text)
        self.code = code
        """S3's own name of the error, if the server answered."""
        self.may_pass = may_pass
        """Whether another try may succeed."""

    @property
    def is_full(self) -> bool:
        """Whether the bucket has no room."""
        return self.code in FULL


@cache
def expected_errors() -> tuple[type[BaseException], ...]:
    """What calls raise if the network, the server or the settings are at fault."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError
    from fsspec.exceptions import FSTimeoutError

    return (OSError, TimeoutError, FSTimeoutError, BotoCoreError, ClientError, aiohttp.ClientError)


def sentence_of(error: BaseException, url: str) -> BucketError:
    """The error with a sentence that says what to do."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    code = _code(error)
    bucket = url.removeprefix("s3://").partition("/")[0]
    text, may_pass = f"{url}: {type(error).__name__}: {str(error)[:300]}", True
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        may_pass = False
        text = (
            f"{url}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "another source that boto3 knows"
        )
    elif code == "NoSuchBucket":
        may_pass = False
        text = f"{url}: {_server()} has no bucket {bucket!r}; make it, or correct TINKERAPI_STORAGE"
    elif code in CREDENTIALS:
        may_pass = False
        text = (
            f"{url}: {_server()} refuses the credentials ({code}); correct AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    elif code in FULL:
        may_pass = False
        text = (
            f"{url}: {_server()} has no room left for it ({code}); delete files, or raise its quota"
        )
    elif code in SKEWED:
        may_pass = False
        text = (
            f"{url}: {_server()} refuses this machine's clock ({code}), which says "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; synchronize it (NTP)"
        )
    elif code in DENIED or isinstance(error, PermissionError):
        may_pass = False
        text = (
            f"{url}: {_server()} denies access ({code or error}); the credentials need "
            "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there"
        )
    elif code in OTHER_REGION:
        may_pass = False
        text = f"{url}: the bucket is in another region; set AWS_DEFAULT_REGION ({error})"
    elif isinstance(error, FileExistsError):
        may_pass = False
    elif not code:
        text = (
            f"{url}: {_server()} does not answer ({type(error).__name__}); check the network, and "
            "AWS_ENDPOINT_URL if it is set"
        )
    return BucketError(text, code=code, may_pass=may_pass)


def _code(error: BaseException) -> str:
    for source in (error, error.__cause__):
        response: Any = getattr(source, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _server() -> str:
    return (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
    )
