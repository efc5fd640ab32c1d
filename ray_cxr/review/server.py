"""Serve the pages on this machine only, until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from ray_cxr import extras
from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError, ImageError
from ray_cxr.review.guard import Session
from ray_cxr.review.index import ReviewIndex, Sample, read_index
from ray_cxr.review.session import ReviewSession, read_image_boxes
from ray_cxr.review.verdicts import VerdictLog
from ray_cxr.storage import dicomweb
from ray_cxr.storage.files import read_bytes
from ray_cxr.storage.paths import find_dicomweb

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
#: How long the start waits for one image, seconds.
_PATIENCE_S = 10.0


def open_socket(port: int | None) -> socket.socket:
    """Return a listening socket on the loopback interface.

    Args:
        port: None for `DEFAULT_PORT`, or a free port if that is in use.

    Raises:
        ConfigError: the port was requested and cannot be used.
    """
    for wanted in (DEFAULT_PORT, 0) if port is None else (port,):
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, wanted))
            found.listen(128)
        except OSError as error:
            found.close()
            if port is None and error.errno in (errno.EADDRINUSE, errno.EACCES) and wanted:
                continue
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ConfigError(f"--port {wanted}: {reason}; pass another port, or none for a free one") from None
        return found
    raise AssertionError  # port 0 is always free


def serve(review: ReviewSession, listener: socket.socket, on_address: Callable[[str], None]) -> None:
    """Serve a session on a listening socket until Ctrl-C or SIGTERM.

    Args:
        on_address: receives the address with a token, first and again after each login, for another browser.
    """
    extras.require("starlette", "review")
    extras.require("uvicorn", "review")
    import uvicorn

    from ray_cxr.review.app import build_app

    port = listener.getsockname()[1]

    def announce(token: str) -> None:
        on_address(f"http://{HOST}:{port}/?token={token}")

    login = Session(announce)
    config = uvicorn.Config(
        build_app(review, login),
        log_config=None,  # uvicorn's own closes all log handlers of the process
        log_level=logging.WARNING,
        access_log=False,  # addresses contain ids of patients
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        timeout_graceful_shutdown=3,
    )
    announce(login.token)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def open_review(
    scores: str | Path,
    reader: str,
    labels: str | Path | None = None,
    *,
    is_blind: bool = False,
    sample: Sample | None = None,
    boxes: str | None = None,
    pacs: PacsSettings | None = None,
) -> ReviewSession:
    """Read a finished run, tables to show on request, and earlier verdicts; a sample is always read blind.

    Args:
        pacs: for images of a PACS; None for the defaults.
    """
    is_blind = is_blind or sample is not None
    index = read_index(scores, labels, is_blind=is_blind, sample=sample)
    if find_dicomweb(pa.chunked_array([index.paths])) is not None:
        dicomweb.configure(pacs or PacsSettings())
    drawn = None if sample is None else f"{len(index):,} studies at random, seed {sample.seed}"
    found = None if boxes is None else read_image_boxes(index, boxes)
    return ReviewSession(index, VerdictLog(index.scores, reader), is_blind=is_blind, sample=drawn, boxes=found)


def check_images(index: ReviewIndex) -> str | None:
    """Try to read one image that `score` could read; return why that fails and what to do, otherwise None."""
    row = next((row for rows in index.rows_of for row in rows if index.ok[row]), None)
    if row is None:
        return None
    path = index.paths[row].as_py()
    found = [f"storage: no answer within {_PATIENCE_S:.0f} seconds"]

    def read() -> None:
        try:
            read_bytes(path)
            found[:] = []
        except ImageError as error:
            found[:] = [str(error)]

    thread = threading.Thread(target=read, name="check", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    if not found:
        return None
    remedy = "make the images readable here, under the paths that score read"
    if path is not None and dicomweb.is_dicomweb(path):
        remedy = "pass the settings of the section pacs that score got, such as --set pacs.credentials=FILE"
    return f"1 image was tried, and it cannot be read ({found[0]}). Remedy: {remedy}."
