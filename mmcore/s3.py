"""Access to S3: the client, its retries, and files that are read in parts."""

import functools
import io
import logging
import os
import random
import time
from typing import Any

S3 = "s3://"
_S3_MAX_ATTEMPTS = 10
# Failed attempts before a warning. The first retries are quick, later ones take long.
_S3_WARN_AFTER = 3
# Wait before attempt n + 1: a random share of base · 2^(n - 1), at most the last of these values.
_S3_BACKOFF_S, _S3_THROTTLED_BACKOFF_S, _S3_MAX_BACKOFF_S = 0.05, 1.0, 20.0
_S3_CONNECT_TIMEOUT_S = 10
_S3_READ_TIMEOUT_S = 60
# Connections kept open for the threads of one process. Any further connection is opened for each request.
_S3_CONNECTIONS = 32


@functools.cache
def s3_client(process_id: int) -> Any:
    """One client per process: boto3 clients are safe across threads but not across forks."""
    import boto3
    from botocore.config import Config

    # A new session: creating clients from one session in several threads is not safe.
    client = boto3.session.Session().client(
        "s3",
        config=Config(
            # Needed for presigned links. boto3's default for them is the old scheme, which newer regions refuse.
            signature_version="s3v4",
            # boto3's own retries are off. In its standard mode all requests share one retry quota. With one failure
            # in five requests the quota is used up after about a thousand requests, and the next failure is final.
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=_S3_CONNECT_TIMEOUT_S,
            read_timeout=_S3_READ_TIMEOUT_S,
            max_pool_connections=_S3_CONNECTIONS,
        ),
    )
    client.meta.events.register("needs-retry.s3", _s3_retry_delay)
    return client


def _s3_retry_delay(
    response: tuple[Any, dict[str, Any]] | None, attempts: int, caught_exception: Exception | None, **_: Any
) -> float | None:
    """Seconds until the next attempt of a request; None to stop. botocore calls this after each attempt."""
    from botocore.exceptions import ConnectionError, HTTPClientError

    if attempts >= _S3_MAX_ATTEMPTS:
        return None
    base = _S3_BACKOFF_S
    if response is None:
        if not isinstance(caught_exception, ConnectionError | HTTPClientError):
            return None
    else:
        status, code = response[0].status_code, response[1].get("Error", {}).get("Code")
        if status in (429, 503):
            base = _S3_THROTTLED_BACKOFF_S
        elif status not in (500, 502, 504) and code != "RequestTimeout":
            return None
    if attempts == _S3_WARN_AFTER:
        reason = (
            f"answers {response[0].status_code}" if response is not None else f"does not answer: {caught_exception}"
        )
        logging.getLogger(__name__).warning("S3 %s; attempt %d of %d", reason, attempts + 1, _S3_MAX_ATTEMPTS)
    return _s3_backoff(base, attempts)


def _s3_backoff(base: float, attempts: int) -> float:
    return random.random() * min(_S3_MAX_BACKOFF_S, base * 2 ** (attempts - 1))


def read_object(bucket: str, key: str, **part: str) -> bytes:
    """An object, or a part of it by boto3's arguments in `part`, such as Range. Raises FileNotFoundError."""
    from botocore.exceptions import ClientError, IncompleteReadError, ResponseStreamingError

    for attempt in range(1, _S3_MAX_ATTEMPTS + 1):
        try:
            return s3_client(os.getpid()).get_object(Bucket=bucket, Key=key, **part)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                raise FileNotFoundError(f"{S3}{bucket}/{key}") from None
            raise
        except (IncompleteReadError, ResponseStreamingError):
            # botocore retries until an answer begins. This answer broke off in the middle.
            if attempt == _S3_MAX_ATTEMPTS:
                raise
            time.sleep(_s3_backoff(_S3_BACKOFF_S, attempt))
    raise AssertionError("the last attempt returned or raised")


class S3File(io.RawIOBase):
    """An object of `size` bytes that is read in parts."""

    def __init__(self, bucket: str, key: str, size: int) -> None:
        self.bucket, self.key, self.size, self.at = bucket, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.at + len(buffer))
        if self.at >= end:
            return 0
        data = read_object(self.bucket, self.key, Range=f"bytes={self.at}-{end - 1}")
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
