"""The command `review`: its address, its end, and input that it refuses."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from dicomweb_server import DicomwebServer
from score_archive import Archive
from sr_site import write_image

from ray_cxr.config import PacsSettings
from ray_cxr.data import manifest
from ray_cxr.errors import ConfigError
from ray_cxr.review import server
from ray_cxr.review.session import Decision
from ray_cxr.review.verdicts import read_verdicts
from ray_cxr.storage import remote
from ray_cxr.storage.dicomweb import configure

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the addresses on which the command would serve; it ends at once, as by Ctrl-C."""
    found: list[tuple[str, int]] = []

    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        found.append(sockets[0].getsockname())
        for each in sockets:
            each.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return found


def test_command_prints_the_address_and_ends(served: list[Any], archive: Archive, command: Command) -> None:
    code, said, err = command("review", archive.root / "SCORES", "--reader", "anna")
    assert code == 0, err
    [(host, port)] = served
    assert host == "127.0.0.1"
    assert re.search(rf"http://127\.0\.0\.1:{port}/\?token=[\w-]{{40,}}$", said, re.MULTILINE)
    assert not (archive.root / "SCORES" / "reviews").exists()


def test_start_warns_if_images_cannot_be_read(served: list[Any], archive: Archive, command: Command) -> None:
    """Without the credentials of the PACS, the page would open and show no image."""
    with DicomwebServer(token="secret-1") as pacs:
        archive.paths = [pacs.add(write_image(archive.root / "image.dcm", 1, 1).read_bytes())] * archive.n
        scores = archive.scores()
        (archive.root / "token").write_text("secret-1\n")
        (archive.root / "token").chmod(0o600)
        plain = command("review", scores)
        token = f"pacs.token_file={archive.root / 'token'}"
        given = command("review", scores, "--set", token, "--set", f"pacs.host=127.0.0.1:{pacs.port}")
    configure(PacsSettings())
    assert (plain[0], given[0]) == (0, 0)
    assert re.search(r"WARNING: .*permission.*--set pacs\.credentials=", plain[1])
    assert "WARNING" not in given[1]


def test_command_closes_no_log_handler_of_the_process(
    served: list[Any], archive: Archive, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some handlers, such as TensorFlow's, close their stream, which is the standard error of the process."""
    closed: list[bool] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "close", lambda: closed.append(True))
    assert command("review", archive.root / "SCORES")[0] == 0
    assert served
    assert not closed


def test_port_in_use(served: list[Any], archive: Archive, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        code, _, err = command("review", archive.root / "SCORES", "--port", taken)
        assert (code, err.count("\n")) == (2, 1)
        # The default gives way to a free port.
        monkeypatch.setattr(server, "DEFAULT_PORT", taken)
        assert command("review", archive.root / "SCORES")[0] == 0
        assert served[0][1] != taken
        with pytest.raises(ConfigError):
            server.open_socket(taken)


def test_wrong_input_is_one_line(archive: Archive, command: Command, tmp_path: Path) -> None:
    scores = archive.root / "SCORES"
    other = Archive(tmp_path / "other", patients=2)
    other.ids = [f"other_{name}" for name in other.ids]
    unfinished = Path(other.scores(finished=False))
    for arguments in (
        (unfinished,),
        (scores / "scores" / "00000.parquet", "--port", 0),
        (tmp_path / "nothing",),
        (scores, "--port", 70000),
        (scores, "--reader", "a\nb"),
        (scores, "--sample", 0),
        (scores, "--labels", other.labels()),
    ):
        code, _, err = command("review", *arguments)
        assert (code, err.count("\n")) == (2, 1), arguments


@contextlib.contextmanager
def start(scores: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], http.client.HTTPConnection, str]]:
    """Start the command; yield its process, a connection and the path with the token."""
    words = [sys.executable, "-m", "ray_cxr", "review", str(scores), "--reader", "anna", *more]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stdout is not None
        address = next(line for line in process.stdout if "token=" in line)
        port, path = re.search(r":(\d+)(/\?token=\S+)", address).groups()  # type: ignore[union-attr]
        try:
            yield process, http.client.HTTPConnection("127.0.0.1", int(port), timeout=30), path
        finally:
            process.kill()


def send(connection: http.client.HTTPConnection, cookie: str, row: int) -> int:
    headers = {"Cookie": cookie, "Origin": f"http://127.0.0.1:{connection.port}", "Content-Type": "application/json"}
    body = json.dumps({"row": row, "finding": "Effusion", "present": 1})
    connection.request("POST", "/verdicts", body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer.status


@pytest.mark.long
def test_killed_server_loses_no_verdict_and_ctrl_c_is_an_end(archive: Archive) -> None:
    scores = archive.root / "SCORES"
    ends = {signal.SIGKILL: -9, signal.SIGINT: 0}
    for number, (ending, code) in enumerate(ends.items()):
        with start(scores) as (process, connection, path):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            cookie = (answer.getheader("set-cookie") or "").partition(";")[0]
            assert [send(connection, cookie, row) for row in range(10 * number, 10 * number + 10)] == [200] * 10
            process.send_signal(ending)
            assert process.wait(30) == code
        recorded = read_verdicts(scores)
        assert [verdict.image_id for verdict in recorded] == archive.ids[: 10 * (number + 1)]


@pytest.mark.long
def test_two_readers_at_once_lose_nothing(archive: Archive) -> None:
    scores = archive.root / "SCORES"
    with start(scores) as (_, first, path), start(scores) as (_, second, other):
        cookies = []
        for connection, entry in ((first, path), (second, other)):
            connection.request("GET", entry)
            answer = connection.getresponse()
            answer.read()
            cookies.append((answer.getheader("set-cookie") or "").partition(";")[0])
        for row in range(20):
            assert send(first, cookies[0], row) == send(second, cookies[1], row) == 200
    assert sorted(verdict.image_id for verdict in read_verdicts(scores)) == sorted(archive.ids[:20] * 2)


@pytest.mark.long
def test_verdicts_on_a_run_in_a_bucket_are_written_there(archive: Archive, bucket: Any, command: Command) -> None:
    bucket.upload(archive.root / "SCORES", "reviewed-night")
    address = bucket("reviewed-night")
    sessions = [server.open_review(address, name) for name in ("anna", "bert")]
    for row in range(3):
        for session in sessions:
            session.decide(Decision(row, "Effusion", None, 1, "", False, False))
    assert len(read_verdicts(remote.to_path(address))) == 6
    assert server.open_review(address, "anna").reviewed.nonzero()[0].tolist() == [0, 1, 2]
    out = archive.root / "labels-of-readers.parquet"
    code, _, err = command("reviews", address, "--out", out)
    assert code == 0, err
    assert manifest.read_manifest(out)["Effusion"].to_pylist() == [1, 1, 1]
