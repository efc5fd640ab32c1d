"""An S3 server on this machine (moto) whose uploads are slow, wait, or are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

#: The server's bucket.
BUCKET = "slow"
#: Seconds between two reads of an upload whose speed is limited.
_TICK_S = 0.05


class SlowStore:
    """A context in which the server runs.

    Args:
        bytes_per_second: speed of each upload; None: not limited.

    Attributes:
        refuse: called with the path of each upload; returns an HTTP status to refuse it with, or None.
        running: paths of the uploads in progress.
        address: HOST:PORT.
    """

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._bytes_per_second = bytes_per_second
        self.refuse: Callable[[str], int | None] = lambda path: None
        self.running: list[str] = []

    def __enter__(self) -> Self:
        import boto3
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self._serve = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.client = boto3.client("s3", endpoint_url=f"http://{self.address}", region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()

    def __call__(self, key: str) -> str:
        """Return the address of an object or folder."""
        return f"s3://{BUCKET}/{key}?endpoint_override={self.address}&scheme=http"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def download(self, prefix: str, folder: Path) -> Path:
        """Copy all objects below a prefix into a folder, and return it."""
        for key in self.keys(f"{prefix}/"):
            if not key.endswith("/"):
                path = folder / key.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.get(key))
        return folder

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "PUT" or path.count("/") < 2:
            return self._serve(environ, start_response)
        if status := self.refuse(path):
            code = {403: "AccessDenied", 503: "SlowDown"}.get(status, "InternalError")
            start_response(f"{status} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>refused by the test</Message></Error>".encode()]
        self.running.append(path)
        try:
            if self._bytes_per_second:
                environ["wsgi.input"] = _SlowInput(environ["wsgi.input"], self._bytes_per_second)
            return list(self._serve(environ, start_response))
        finally:
            self.running.remove(path)


class _SlowInput:
    """The body of a request, which arrives at a limited speed."""

    def __init__(self, stream: Any, bytes_per_second: float) -> None:
        self._stream, self._speed = stream, bytes_per_second

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes] = []
        limit = size if size and size > 0 else None
        done = 0
        while limit is None or done < limit:
            step = max(1, int(self._speed * _TICK_S))
            part = self._stream.read(step if limit is None else min(step, limit - done))
            if not part:
                break
            time.sleep(len(part) / self._speed)
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def readline(self, *size: int) -> bytes:
        return self._stream.readline(*size)
