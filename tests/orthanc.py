"""A real PACS for tests: Orthanc with its DICOMweb plugin, and a proxy that disturbs the connection to it.

    with run_orthanc(folder) as pacs:
        pacs.upload([path.read_bytes() for path in files])
        with Disturber(pacs.port) as proxy: ...   # proxy.address answers some requests with 503

`scripts/services pacs` installs Orthanc. The fixture `orthanc` skips tests without it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "reader", "orthanc-test-1"
_PROGRAM = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
_START_S = 60.0
#: Headers that describe one connection, so that a proxy must not copy them.
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "te", "trailer", "upgrade"}


def is_installed() -> bool:
    return Path(_PROGRAM).is_file() and PLUGIN.is_file()


def find_free_ports(count: int) -> list[int]:
    """Return TCP ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Orthanc:
    """An Orthanc server on this machine, with one user and with its storage below `folder`.

    Args:
        folder: for the configuration, the log and the storage; a second start continues with the storage.
        options: further options of Orthanc's configuration.

    Attributes:
        port: of HTTP.
        dicom_port: of DICOM (C-STORE).
        aet: AE title.
        log: file with Orthanc's own lines.
    """

    aet = "ARCHIVE"

    def __init__(self, folder: Path, **options: Any) -> None:
        self.port, self.dicom_port = find_free_ports(2)
        self.log = folder / "orthanc.log"
        self._settings = folder / "orthanc.json"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.port,
            "DicomPort": self.dicom_port,
            "DicomAet": self.aet,
            "DicomCheckCalledAet": True,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "OrthancExplorerEnabled": False,
            "WebDavEnabled": False,
            "SyncStorageArea": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
            "StoneWebViewer": {"Enabled": False},
            **options,
        }
        self._settings.write_text(json.dumps(content, indent=1), encoding="utf-8")
        self._settings.chmod(0o600)

    @property
    def root(self) -> str:
        """Address of DICOMweb."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: it ended or did not answer within 60 s; the message has the end of its log.
        """
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen([_PROGRAM, str(self._settings)], stdout=stream, stderr=stream)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self.request("/system")
                return
            time.sleep(0.1)
        self.stop()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise RuntimeError("\n".join(["Orthanc does not answer. The end of its log:", *lines]))

    def stop(self) -> None:
        """Stop the server; all connections to it break."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def request(self, path: str, data: bytes | None = None) -> Any:
        """Return the JSON that Orthanc's own REST interface answers, which is independent of DICOMweb."""
        return json.loads(self._fetch(path, data, {}))

    def _fetch(self, path: str, data: bytes | None, headers: dict[str, str]) -> bytes:
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", **headers}
        with _OPENER.open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)) as answer:
            return bytes(answer.read())

    def retrieve(self, uids: Iterable[str]) -> dict[str, bytes]:
        """Return the files of instances by SOP Instance UID, unchanged, through WADO-RS."""
        listed = {}
        for entry in self.request("/dicom-web/instances"):
            study, series, one = (entry[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018"))
            listed[one] = f"/dicom-web/studies/{study}/series/{series}/instances/{one}"
        accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
        parts = {one: self._fetch(listed[one], None, accept) for one in uids}
        return {one: body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0] for one, body in parts.items()}

    def write_credentials(self, path: Path) -> Path:
        """Write the login for the setting `pacs.credentials`."""
        path.touch(0o600)
        path.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n", encoding="utf-8")
        return path

    def upload(self, instances: Iterable[bytes]) -> list[str]:
        """Store DICOM files and return the statuses, e.g. `Success` or `AlreadyStored`."""
        with ThreadPoolExecutor(4) as pool:
            return [answer["Status"] for answer in pool.map(lambda data: self.request("/instances", data), instances)]

    def count(self, modality: str | None = None) -> int:
        """Return the number of instances, of one modality if it is given."""
        if modality is None:
            return int(self.request("/statistics")["CountInstances"])
        query = json.dumps({"Level": "Instance", "Query": {"Modality": modality}}).encode()
        return len(self.request("/tools/find", query))

    def list_uids(self) -> list[str]:
        """Return the SOP Instance UID of each instance."""
        entries = self.request("/instances?expand")
        return sorted(entry["MainDicomTags"]["SOPInstanceUID"] for entry in entries)


#: Without the proxies of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def run_orthanc(folder: Path, **options: Any) -> Iterator[Orthanc]:
    """Run Orthanc until the end of the block."""
    server = Orthanc(folder, **options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Disturber:
    """A proxy in front of a server that answers some requests itself with 503, or breaks their connection.

    Args:
        port: of the server, on this machine.
        every: of as many requests, one is answered with 503; 0: none. Can be changed, as the next one.
        broken_every: of as many requests, one gets half of its answer; 0: none.

    Attributes:
        requests: number of requests so far.
        refused: number of answers with 503.
        broken: number of connections closed in the middle of an answer.
        paths: path and query of each request that reached the server, in order.
        most_at_once: highest number of requests in progress at the same time.
    """

    def __init__(self, port: int, *, every: int = 0, broken_every: int = 0) -> None:
        self.requests = self.refused = self.broken = self.most_at_once = 0
        self.paths: list[str] = []
        self._upstream, self.every, self.broken_every = port, every, broken_every
        self._lock, self._running = threading.Lock(), 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                proxy._answer(self)

            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def root(self) -> str:
        """Address of DICOMweb through the proxy."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests += 1
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            refuse = bool(self.every) and self.requests % self.every == 0
            breaks = bool(self.broken_every) and self.requests % self.broken_every == 0
            self.refused += refuse
            self.broken += breaks and not refuse
            if not refuse:
                self.paths.append(handler.path)
        try:
            if refuse:
                handler.send_response(503)
                handler.send_header("Retry-After", "0")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
            else:
                self._forward(handler, body, breaks)
        except OSError:
            handler.close_connection = True
        finally:
            with self._lock:
                self._running -= 1

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, breaks: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
            # Orthanc writes the addresses of its answers by this header.
            headers["Host"] = handler.headers.get("Host", "")
            connection.request(handler.command, handler.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            handler.close_connection = True  # the server is down: so is the connection
            return
        finally:
            connection.close()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if breaks else data)
        if breaks:
            handler.close_connection = True
