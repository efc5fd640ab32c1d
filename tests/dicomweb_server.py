"""A small PACS in threads of the test's process: QIDO-RS, WADO-RS and STOW-RS over http.server, with faults on demand.

    with DicomwebServer() as pacs:
        pacs.add(dicom_bytes)
        pacs.fail(503, times=2)                           # the next two requests
        pacs.disturb(trickle, where="/instances/")        # every request whose path contains this
        search(f"{pacs.address}?ModalitiesInStudy=DX")

`requests` keeps method, path with query, and headers of each request, in order.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import pydicom
from pydicom.datadict import keyword_for_tag, tag_for_keyword

ROOT = "/dicom-web"
STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
_BOUNDARY = "part-of/the=answer"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    client: int = 0  # port of the client, so that connections can be told apart


@dataclass
class DicomwebServer:
    """Serves `instances` until the block ends. Change its attributes at any time.

    Attributes:
        login: `user:password` that requests need; None for none.
        token: bearer token that requests need; None for none.
        page_limit: maximum number of results in an answer, reported with Warning 299; None for none.
        ignores_offset: whether each page is the first.
        cuts_first: whether the limit is applied before the offset.
        has_counts: whether studies report how many instances they have.
        outcome: for STOW-RS, returns status and JSON from the dataset, which is then not stored. Without it, or if it
            returns None, the dataset is stored, and the answer is 200.
        store_headers, parts, quote: how the answer of WADO-RS looks.
    """

    tls: ssl.SSLContext | None = None
    login: str | None = None
    token: str | None = None
    page_limit: int | None = None
    ignores_offset: bool = False
    cuts_first: bool = False
    has_counts: bool = True
    outcome: Callable[[pydicom.Dataset], tuple[int, Any] | None] | None = None
    parts: int = 1
    quote: bool = True
    port: int = 0  # 0: any; it stays the same when the server starts again
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)  # by SOP Instance UID: DICOM JSON model
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[Callable[[Handler], None], str, int]] = field(default_factory=list)  # behaviour, where, times

    def __enter__(self) -> Self:
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("BoundHandler", (Handler,), {"pacs": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        if self.tls:
            self._server.socket = self.tls.wrap_socket(self._server.socket, True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forget instances, requests and faults, and end answers that would never end."""
        self.stopping.set()
        self.__init__(tls=self.tls, port=self.port)  # type: ignore[misc]
        self.stopping = threading.Event()

    @property
    def address(self) -> str:
        return f"dicomweb+{'https' if self.tls else 'http'}://127.0.0.1:{self.port}{ROOT}"

    def add(self, data: bytes, **attributes: Any) -> str:
        """Store a DICOM file, and return the path of its instance. `attributes` replace values of the listing."""
        dataset = pydicom.dcmread(BytesIO(data), force=True)
        dataset.pop("PixelData", None)
        row = json.loads(json.dumps(dataset.to_json_dict(suppress_invalid_tags=True)))
        for name, value in attributes.items():
            row[f"{tag_for_keyword(name):08X}"] = {"vr": "LO", "Value": [value]}
        uid = get(row, INSTANCE)
        self.instances[uid], self.files[uid] = row, data
        return f"{self.address}/studies/{get(row, STUDY)}/series/{get(row, SERIES)}/instances/{uid}"

    def disturb(self, behaviour: Callable[[Handler], None], *, where: str = "", times: int = 1_000_000) -> None:
        """Let `behaviour` answer the next requests whose path contains a text."""
        self.faults.append((behaviour, where, times))

    def fail(self, status: int, *, times: int = 1, where: str = "", **headers: str) -> None:
        """Answer the next requests with a status. Headers are given as `Retry_After="1"`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.disturb(lambda handler: handler.answer(status, b"{}", **named), where=where, times=times)

    def take_fault(self, path: str) -> Callable[[Handler], None] | None:
        for place, (behaviour, where, times) in enumerate(self.faults):
            if where in path and times > 0:
                self.faults[place] = behaviour, where, times - 1
                return behaviour
        return None


class Handler(BaseHTTPRequestHandler):
    pacs: DicomwebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body of each answer waits 40 ms after its headers

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):  # the client may leave at any time
            super().handle()

    def answer(self, status: int, body: bytes = b"", kind: str = "application/dicom+json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_POST(self) -> None:
        self._serve(self._post)

    def _serve(self, method: Callable[[str], None]) -> None:
        pacs = self.pacs
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pacs.requests.append(Request(self.command, self.path, dict(self.headers), self.body, self.client_address[1]))
        if behaviour := pacs.take_fault(self.path):
            behaviour(self)
            return
        expected = f"Bearer {pacs.token}" if pacs.token else None
        if pacs.login:
            expected = f"Basic {base64.b64encode(pacs.login.encode()).decode()}"
        if expected and self.headers.get("Authorization") != expected:
            self.answer(401)
        elif not self.path.startswith(ROOT):
            self.answer(404)
        else:
            method(urlsplit(self.path).path.removeprefix(ROOT))

    def _get(self, path: str) -> None:
        rows = list(self.pacs.instances.values())
        if path == "/studies":
            studies: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                studies.setdefault(str(get(row, STUDY)), []).append(row)
            self._list([_describe_study(group, self.pacs.has_counts) for group in studies.values()])
        elif match := re.fullmatch("/studies/([^/]+)/instances", path):
            found = [row for row in rows if get(row, STUDY) == match[1]]
            self._list(found) if found else self.answer(404)
        elif match := re.fullmatch("/studies/([^/]+)/series/([^/]+)/instances/([^/]+)(/metadata)?", path):
            row = self.pacs.instances.get(match[3])
            if row is None or (get(row, STUDY), get(row, SERIES)) != (match[1], match[2]):
                self.answer(404)
            elif match[4]:
                self.answer(200, json.dumps([row]).encode())
            else:
                self.send_files([self.pacs.files[match[3]]] * self.pacs.parts)
        else:
            self.answer(404)

    def send_files(self, files: list[bytes], kind: str = "application/dicom") -> None:
        mark = _BOUNDARY if self.pacs.quote else "plain.boundary"
        shown = f'"{mark}"' if self.pacs.quote else mark
        part = b"--%b\r\nContent-Type: %b\r\n\r\n%b\r\n"
        body = b"".join(part % (mark.encode(), kind.encode(), data) for data in files) + f"--{mark}--\r\n".encode()
        self.answer(200, body, f'multipart/related; type="application/dicom"; boundary={shown}')

    def _list(self, rows: list[dict[str, Any]]) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        offset = 0 if self.pacs.ignores_offset else int(query.pop("offset", 0))
        limit = int(query.pop("limit", len(rows)))
        for name in ("includefield", "fuzzymatching", "offset"):
            query.pop(name, None)
        rows = [row for row in rows if all(_matches(row, key, value) for key, value in query.items())]
        rows = rows[: limit if self.pacs.cuts_first else None][offset:]
        is_cut = self.pacs.page_limit is not None and len(rows) > self.pacs.page_limit < limit
        rows = rows[: min(limit, self.pacs.page_limit or limit)]
        warning = {"Warning": '299 pacs "There are additional results that can be requested"'} if is_cut else {}
        if rows:
            self.answer(200, json.dumps(rows).encode(), **warning)
        else:
            self.answer(204)

    def _post(self, path: str) -> None:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        part = self.body.split(b"--" + boundary[1].encode())[1]
        data = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        dataset = pydicom.dcmread(BytesIO(data))
        if self.pacs.outcome and (answer := self.pacs.outcome(dataset)):
            status, content = answer
            self.answer(status, content if isinstance(content, bytes) else json.dumps(content).encode())
            return
        self.pacs.add(data)
        stored = {"00081150": {"vr": "UI", "Value": [dataset.SOPClassUID]}}
        stored["00081155"] = {"vr": "UI", "Value": [dataset.SOPInstanceUID]}
        self.answer(200, json.dumps({"00081199": {"vr": "SQ", "Value": [stored]}}).encode())


def get(row: dict[str, Any], tag: str) -> Any:
    """Return the first value of a tag, or an empty text."""
    return (row.get(tag, {}).get("Value") or [""])[0]


def _describe_study(rows: list[dict[str, Any]], has_counts: bool) -> dict[str, Any]:
    tags = (STUDY, "00080020", "00100020", "00100010", "00100040", "00100030")
    modalities = sorted({get(row, "00080060") for row in rows})
    count = {"00201208": {"vr": "IS", "Value": [len(rows)]}} if has_counts else {}
    return {tag: rows[0][tag] for tag in tags if tag in rows[0]} | count | {"00080061": {"Value": modalities}}


def _matches(row: dict[str, Any], key: str, value: str) -> bool:
    """Match as QIDO-RS does: a value, a range of dates, or one of the values."""
    tag = key.upper() if re.fullmatch("[0-9A-Fa-f]{8}", key) else f"{tag_for_keyword(key):08X}"
    values = row.get(tag, {}).get("Value", [""])
    actual = [str(one.get("Alphabetic") if isinstance(one, dict) else one) for one in values]
    if keyword_for_tag(int(tag, 16)).endswith("Date") and "-" in value:
        start, _, end = value.partition("-")
        return (not start or actual[0] >= start) and (not end or actual[0] <= end)
    return not value or value in actual


def trickle(handler: Handler) -> None:
    """Send one byte at a time, forever."""
    stopping = handler.pacs.stopping
    handler.send_response(200)
    handler.send_header("Content-Type", "application/dicom")
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not stopping.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def trickle_headers(handler: Handler) -> None:
    """Send a header forever."""
    stopping = handler.pacs.stopping
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not stopping.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def send_endless(handler: Handler) -> None:
    """Send chunks forever."""
    stopping = handler.pacs.stopping
    handler.send_response(200)
    handler.send_header("Content-Type", "application/dicom")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not stopping.is_set():
        handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def break_connection(handler: Handler) -> None:
    """Promise more bytes than are sent."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/dicom")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x")
    handler.wfile.flush()
    time.sleep(0.01)
    handler.close_connection = True
    handler.connection.close()


def redirect(location: str, status: int = 302) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(status, Location=location)
