"""Reading from a PACS and storing in it: what is sent, what is accepted, and what never leaves the process."""

from __future__ import annotations

import contextlib
import gzip
import ipaddress
import json
import logging
import multiprocessing
import pickle
import ssl
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pydicom
import pytest
from dicomweb_server import (
    DicomwebServer,
    Handler,
    break_connection,
    redirect,
    send_endless,
    trickle,
    trickle_headers,
)
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError, ImageError, InputError, RayCxrError
from ray_cxr.storage import dicomweb, dicomweb_http
from ray_cxr.storage.dicomweb import check_root, configure, fetch_instance, fetch_metadata, search, store
from ray_cxr.storage.dicomweb_access import Access, ProcessLimiter
from ray_cxr.storage.files import read_bytes
from ray_cxr.storage.paths import file_name, make_absolute, redact
from ray_cxr.storage.stores import open_stream

SECRET, USER = "pass-Wort-93c1", "night-account"
QUERY = "Mueller"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dicomweb_http, "BACKOFF_S", 0.001)
    use()
    yield
    configure(PacsSettings())


@pytest.fixture(scope="module")
def server() -> Iterator[DicomwebServer]:
    with DicomwebServer() as server:
        yield server


@pytest.fixture
def pacs(server: DicomwebServer) -> Iterator[DicomwebServer]:
    yield server
    server.reset()


def use(**settings: Any) -> None:
    configure(PacsSettings(**{"per_second": 10_000.0, "timeout_s": 20.0, **settings}))


def make_file(number: int, study: int | None = None, **attributes: Any) -> bytes:
    """Return a small DICOM file; by default each is in a study of its own."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = f"1.2.3.{number}"
    dataset.StudyInstanceUID = f"1.2.1.{number if study is None else study}"
    dataset.SeriesInstanceUID = f"{dataset.StudyInstanceUID}.1"
    dataset.Modality, dataset.PatientID = "CR", f"P{number}"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    with BytesIO() as stream:
        pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
        return stream.getvalue()


def write_secret(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def write_netrc(folder: Path) -> str:
    return write_secret(folder / "netrc", f"machine 127.0.0.1 login {USER} password {SECRET}\n")


def list_uids(address: str, gaps: Counter[str] | None = None) -> list[str]:
    """Return the SOP Instance UIDs that a search finds; gaps must be expected."""
    found: Counter[str] = Counter()
    uids = [dicomweb.get_text(row, "00080018") for row in search(address, found)]
    assert gaps is not None or not found
    (Counter() if gaps is None else gaps).update(found)
    return uids


def fail(path: str, code: str, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_instance(path, **options)
    assert caught.value.code == code, caught.value.message
    assert caught.value.message == " ".join(caught.value.message.split())
    return caught.value.message


# --- Addresses


@pytest.mark.parametrize(
    "address",
    [
        f"dicomweb+https://{USER}:{SECRET}@pacs.example/dicom-web",
        f"dicomweb+https://{USER}:{SECRET}/x@pacs.example/dicom-web",
        f"dicomweb+https://{USER}:1?{SECRET}@pacs.example/dicom-web",
        f"dicomweb+https://{USER}:1#{SECRET}@pacs.example/dicom-web",
        f"dicomweb+https://pacs.example/dicom-web#{SECRET}",
        f"dicomweb+ftp://pacs.example/dicom-web?PatientName={SECRET}",
        f"dicomweb+http://pacs.example/dicom-web?PatientName={SECRET}",
        f"dicomweb+http://127.0.0.1.pacs.example/?PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?StudyDat={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?0010001={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?{SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?{SECRET}=1",
        f"dicomweb+https://pacs.example/dicom-web?PatientName={SECRET}&PatientName=b",
        f"dicomweb+https://pacs.example/dicom-web?limit=3&PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom web?PatientName={SECRET}",
        f"dicomweb+https://pacs.example/a/../b?PatientName={SECRET}",
        f"dicomweb+https://pacs.example/a/%2E%2e/b?PatientName={SECRET}",
        f"dicomweb+https://pacs.example:port/a?PatientName={SECRET}",
        f"dicomweb+https:///a?PatientName={SECRET}",
        f"dicomweb+https://pacs.example/root/studies/1.2?PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?StudyDate=2026-01-05&PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?StudyDate=20261305&PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?00080020=20260106-20260105&PatientName={SECRET}",
        f"dicomweb+https://pacs.example/dicom-web?StudyDate=-&PatientName={SECRET}",
    ],
)
def test_wrong_address_is_one_line_without_secrets(address: str) -> None:
    with pytest.raises(InputError) as caught:
        search(address, Counter())
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert text.splitlines() == [text]
    assert SECRET not in text
    assert USER not in text
    assert SECRET not in redact(address)


@pytest.mark.parametrize("date", ["20260105", "20260101-20260131", "20260101-", "-20260131", ""])
def test_dates_of_dicom_are_accepted(date: str) -> None:
    search(f"dicomweb+https://pacs.example/dicom-web?StudyDate={date}&StudyTime=0700-1200", Counter())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1:80", "[::1]:8042", "LocalHost:1"])
def test_http_is_for_loopback(host: str) -> None:
    search(f"dicomweb+http://{host}/dicom-web?00100020=x&Modality=DX&fuzzymatching=true", Counter())
    check_root(f"dicomweb+http://{host}/dicom-web/")


@pytest.mark.parametrize("uid", ["1.2/../../x", "1.2?x", "1." + "2" * 63, "", "1..2", "1.2 ", "1.2%2f3", "1.٢"])
def test_uid_of_a_listing_becomes_no_other_address(uid: str) -> None:
    root = "dicomweb+https://pacs.example/dicom-web"
    for place in range(3):
        uids = [uid if number == place else "1.2" for number in range(3)]
        with pytest.raises(ImageError, match="corrupt"):
            dicomweb.make_instance_path(root, *uids)
        fail(f"{root}/studies/{uids[0]}/series/{uids[1]}/instances/{uids[2]}", "missing")


def test_path_of_an_instance_has_no_query_and_a_name() -> None:
    path = dicomweb.make_instance_path("DICOMWEB+HTTPS://pacs.example/a?StudyDate=20260101", "1.2", "1.3", "1.4")
    assert path == "dicomweb+https://pacs.example/a/studies/1.2/series/1.3/instances/1.4"
    assert file_name(path) == "1.4"
    assert make_absolute(path) == path
    assert dicomweb.is_dicomweb(path)


# --- Retrieval


def test_stored_bytes_arrive_unchanged(pacs: DicomwebServer) -> None:
    data = make_file(1, PatientComments="\r\n--part-of/the=\r\n\r\n")
    path = pacs.add(data)
    for pacs.quote in (True, False):
        assert read_bytes(path) == data
    with open_stream(path) as read:
        assert read(7) + read(1 << 20) == data
    assert fetch_metadata(path)["00080018"]["Value"] == ["1.2.3.1"]
    sent = pacs.requests[0].headers
    assert sent["Accept"] == 'multipart/related; type="application/dicom"; transfer-syntax=*', "the PACS may transcode"
    assert sent["Accept-Encoding"] == "identity"


def answer_with(body: bytes, kind: str, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(200, body, kind, **headers)


def strip_meta(data: bytes) -> bytes:
    """Return the data set of a file alone, in Implicit VR Little Endian, as old archives store it."""
    dataset = pydicom.dcmread(BytesIO(data))
    out = BytesIO()
    pydicom.dcmwrite(out, pydicom.Dataset(dataset), implicit_vr=True, little_endian=True)
    return out.getvalue()


RELATED = "multipart/related; type=application/dicom; boundary="
PART = b"\r\nContent-Type: application/dicom\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (make_file(1), "application/dicom", None),
        (b"preamble\r\n--b" + PART + make_file(1) + b"\r\n--b--\r\nepilogue", RELATED + "b", None),
        (b"--b\r\n\r\n" + make_file(1) + b"\r\n--b--", RELATED + '"b"', None),
        (b"--b\r\nX: 1\r\n\r\n" + make_file(1) + b"\r\n--b--", RELATED + '"b"', None),
        (b"--b" + PART + make_file(2) + b"\r\n--b--", RELATED + "b", "storage"),
        (b"--b" + PART + make_file(11) + b"\r\n--b--", RELATED + "b", "storage"),
        (b"--b" + PART + make_file(1, SOPInstanceUID="2.1.2.3.1") + b"\r\n--b--", RELATED + "b", "storage"),
        (b"--b" + PART + make_file(2, StudyInstanceUID="1.2.3.1") + b"\r\n--b--", RELATED + "b", "storage"),
        (strip_meta(make_file(1)), "application/dicom", None),
        (strip_meta(make_file(2, StudyInstanceUID="1.2.3.1")), "application/dicom", "storage"),
        (b"--b" + (PART + make_file(1) + b"\r\n--b") * 2 + b"--", RELATED + "b", "storage"),
        (b"--b" + PART + make_file(1), RELATED + "b", "storage"),
        (b"--b--", RELATED + "b", "storage"),
        (b"", RELATED + "b", "storage"),
        (b"--b" + PART + b"\r\n--b--", RELATED + "b", "empty"),
        (b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + make_file(1) + b"\r\n--b--", RELATED + "b", "storage"),
        (make_file(1), "multipart/related; type=application/dicom", "storage"),
        (b"<html>log in, 1.2.3.1</html>", "text/html", "storage"),
        (b"", "application/dicom", "empty"),
    ],
)
def test_answer_is_the_requested_file_or_an_error(
    pacs: DicomwebServer, body: bytes, kind: str, code: str | None
) -> None:
    path = pacs.add(make_file(1))
    pacs.disturb(answer_with(body, kind))
    if code is None:
        assert fetch_instance(path) == (body if kind == "application/dicom" else make_file(1))
    else:
        fail(path, code)


@pytest.mark.parametrize(
    ("status", "code", "count"),
    [(404, "missing", 1), (410, "missing", 1), (401, "permission", 1), (403, "permission", 1), (400, "storage", 1)]
    + [(status, "storage", 3) for status in (429, 500, 502, 503, 504)],
)
def test_status_becomes_a_code_and_busy_servers_are_asked_again(
    pacs: DicomwebServer, status: int, code: str, count: int
) -> None:
    path = pacs.add(make_file(1))
    use(attempts=3)
    pacs.fail(status, times=9)
    assert str(status) in fail(path, code)
    assert len(pacs.requests) == count


def test_server_recovers(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    pacs.fail(503, times=2, Retry_After="0")
    pacs.disturb(break_connection, times=2)
    assert fetch_instance(path) == make_file(1)
    assert len(pacs.requests) == 5


def test_server_that_is_away_is_an_error_without_its_address(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1)).replace(str(pacs.port), "1")
    assert "127.0.0.1" not in fail(path, "storage")


def test_server_that_stays_down_is_asked_rarely(
    pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = pacs.add(make_file(1))
    use(attempts=1)
    pacs.disturb(break_connection, where="/series/", times=25)
    for _ in range(30):
        fail(path, "storage")
    assert len(pacs.requests) == dicomweb_http.MAX_UNANSWERED
    assert [record.levelname for record in caplog.records if record.name == dicomweb_http.__name__] == ["WARNING"]
    later = time.monotonic() + 100
    monkeypatch.setattr(dicomweb_http.time, "monotonic", lambda: later)
    fail(path, "storage")
    assert len(pacs.requests) == dicomweb_http.MAX_UNANSWERED + 1


def test_each_wait_is_twice_as_long(pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pacs.add(make_file(1))
    slept: list[float] = []
    monkeypatch.setattr(dicomweb_http, "BACKOFF_S", 1.0)
    monkeypatch.setattr(dicomweb_http.time, "sleep", slept.append)
    pacs.fail(503, times=3)
    fetch_instance(path)
    waits = [seconds for seconds in slept if seconds > 0.5]
    assert [round(seconds / 2**number) for number, seconds in enumerate(waits)] == [1, 1, 1]


def test_cookies_are_not_kept(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    pacs.disturb(lambda handler: handler.answer(404, **{"Set-Cookie": "session=1; Path=/"}), times=1)
    fail(path, "missing")
    fetch_instance(path)
    assert "Cookie" not in pacs.requests[-1].headers


def test_body_of_an_error_is_not_read_to_its_end(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    pacs.disturb(lambda handler: handler.answer(404, bytes(2 << 20)))
    fail(path, "missing", max_bytes=100)


def test_busy_server_is_not_down(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    use(attempts=1)
    pacs.fail(500, times=25)
    for _ in range(25):
        fail(path, "storage")
    assert fetch_instance(path) == make_file(1)


@pytest.mark.parametrize(
    ("value", "waits"),
    [
        ("7", 7),
        ("999999", 60),
        ("-1", 0.001),
        ("soon", 0.001),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 60),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_respected_within_bounds(
    pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch, value: str, waits: float
) -> None:
    path = pacs.add(make_file(1))
    slept: list[float] = []
    monkeypatch.setattr(dicomweb_http.time, "sleep", slept.append)
    pacs.fail(429, Retry_After=value)
    fetch_instance(path)
    assert max(slept) == pytest.approx(waits, abs=0.0003)


@pytest.mark.parametrize("behaviour", [trickle, trickle_headers])
def test_slow_server_holds_no_worker(pacs: DicomwebServer, behaviour: Callable[[Handler], None]) -> None:
    path = pacs.add(make_file(1))
    use(timeout_s=0.15, attempts=1)
    pacs.disturb(behaviour)
    started = time.monotonic()
    fail(path, "storage")
    assert time.monotonic() - started < 5, "each byte started the time-out again"


def test_endless_and_large_answers_are_cut(pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pacs.add(make_file(1))
    pacs.disturb(send_endless, times=1)
    fail(path, "too_large", max_bytes=100_000)
    assert len(pacs.requests) == 1, "it was asked again"
    fail(path, "too_large", max_bytes=100)
    pacs.disturb(send_endless, where="/studies?", times=1)
    monkeypatch.setattr(dicomweb, "MAX_JSON_BYTES", 100_000)
    with pytest.raises(InputError, match="bytes"):
        list_uids(pacs.address)


def test_compressed_answer_is_refused(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    bomb = gzip.compress(bytes(10_000_000))
    pacs.disturb(answer_with(bomb, "application/dicom", **{"Content-Encoding": "gzip"}))
    assert "compressed" in fail(path, "storage")


# --- Redirects


def test_redirect_stays_on_the_server(pacs: DicomwebServer, tmp_path: Path) -> None:
    path = pacs.add(make_file(1))
    inner = path.removeprefix(pacs.address)
    pacs.disturb(redirect(f"/dicom-web{inner}?viewer=1"), times=1)
    assert fetch_instance(path) == make_file(1)
    use(credentials=write_netrc(tmp_path))
    with DicomwebServer() as other:
        other.instances, other.files = pacs.instances, pacs.files
        for location in (
            f"http://127.0.0.1:{other.port}/dicom-web{inner}",
            f"http://localhost:{pacs.port}/dicom-web{inner}",
            f"https://127.0.0.1:{pacs.port}/dicom-web{inner}",
            f"//127.0.0.1:{other.port}/dicom-web{inner}",
            f"http://x@127.0.0.1:{pacs.port}/dicom-web{inner}",
            "file:///etc/passwd",
            "http://[",
        ):
            pacs.disturb(redirect(location), times=1)
            assert "redirects" in fail(path, "storage")
        assert not other.requests
    pacs.disturb(redirect(f"/dicom-web{inner}"))
    fail(path, "storage")
    [outcome] = store(pacs.address, [make_file(1)])
    assert outcome.status == "unavailable"


# --- Credentials


@pytest.mark.parametrize(
    ("name", "text", "mode"),
    [
        ("credentials", f"machine h login u password {SECRET}\n", 0o640),
        ("credentials", f"machine h login u password {SECRET}\n", 0o604),
        ("credentials", f"default login u password {SECRET}\n", 0o600),
        ("credentials", f"machine h login u {SECRET}\n", 0o600),
        ("credentials", f"{SECRET}\n", 0o600),
        ("credentials", "", 0o600),
        ("token_file", f"{SECRET}\n", 0o644),
        ("token_file", f"{SECRET} two\n", 0o600),
        ("token_file", f"{SECRET}\nX-Header: 1\n", 0o600),
        ("token_file", "\n", 0o600),
        ("ca_file", f"{SECRET}\n", 0o644),
        ("client_certificate", f"{SECRET}\n", 0o600),
        ("client_certificate", f"{SECRET}\n", 0o644),
    ],
)
def test_wrong_file_is_one_line_without_its_content(tmp_path: Path, name: str, text: str, mode: int) -> None:
    path = write_secret(tmp_path / "file", text, mode)
    with pytest.raises(ConfigError) as caught:
        use(**{name: path, "host": "h"})
    shown = str(caught.value)
    assert shown.splitlines() == [shown]
    assert path in shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    "settings",
    [
        {"token_file": "missing"},
        {"token_file": "missing", "host": "h"},
        {"credentials": "missing"},
        {"credentials": "/dev/null"},
        {"ca_file": "missing"},
        {"client_certificate": "missing", "host": "h"},
        {"client_key": "missing"},
        {"credentials": "a", "token_file": "b", "host": "h"},
        {"host": f"user:{SECRET}@h"},
        {"host": "https://h/x"},
        {"host": "h:port"},
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        use(**settings)
    assert str(caught.value).startswith("pacs.")
    assert SECRET not in str(caught.value)


def test_password_is_sent_only_to_its_host(pacs: DicomwebServer, tmp_path: Path) -> None:
    path = pacs.add(make_file(1))
    pacs.login = f"{USER}:{SECRET}"
    assert "pacs.credentials" in fail(path, "permission")
    use(credentials=write_netrc(tmp_path))
    assert fetch_instance(path) == make_file(1)
    assert "has no line for localhost" in fail(path.replace("127.0.0.1", "localhost"), "permission")
    assert "Authorization" not in pacs.requests[-1].headers


def test_wrong_root_and_missing_tls_are_named(pacs: DicomwebServer) -> None:
    with pytest.raises(InputError, match="check the root"):
        list(search(pacs.address.replace("/dicom-web", "/dicomweb"), Counter()))
    with pytest.raises(InputError, match="TLS"):
        list(search(pacs.address.replace("+http:", "+https:"), Counter()))


def test_token_is_read_again_after_401(pacs: DicomwebServer, tmp_path: Path) -> None:
    path = pacs.add(make_file(1))
    token = write_secret(tmp_path / "token", "first\n")
    use(token_file=token, host=f"127.0.0.1:{pacs.port}")
    pacs.token = "first"
    fetch_instance(path)
    pacs.token = "second"
    fail(path, "permission")
    assert len(pacs.requests) == 2, "the same token was sent again"
    write_secret(tmp_path / "token", "")  # another program is writing it
    fail(path, "permission")
    write_secret(tmp_path / "token", "second")
    assert fetch_instance(path) == make_file(1)


def test_row_of_a_table_sends_no_token_to_another_host(pacs: DicomwebServer, tmp_path: Path) -> None:
    path = pacs.add(make_file(1))
    for host in ("pacs.example", "127.0.0.1", f"127.0.0.1:{pacs.port + 1}", f"localhost:{pacs.port}"):
        use(token_file=write_secret(tmp_path / "token", SECRET), host=host)
        fail(path, "permission")
    assert not pacs.requests


def test_environment_has_no_effect(pacs: DicomwebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pacs.add(make_file(1))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", write_netrc(tmp_path))
    write_netrc(tmp_path).replace("netrc", ".netrc")
    (tmp_path / ".netrc").write_bytes((tmp_path / "netrc").read_bytes())
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    fetch_instance(path)
    assert "Authorization" not in pacs.requests[-1].headers


# --- TLS


def make_certificate(folder: Path, name: str, host: str) -> tuple[str, str]:
    """Write a self-signed certificate for an IP address or a name, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    with_host = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([with_host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    text = certificate.public_bytes(encoding).decode()
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain).decode()
    return write_secret(folder / f"{name}.pem", text), write_secret(folder / f"{name}.key", secret)


def serve_tls(certificate: str, key: str, clients: str | None = None) -> DicomwebServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if clients:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    return DicomwebServer(tls=context)


def test_certificate_of_the_server_is_verified(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "pacs", "127.0.0.1")
    with serve_tls(certificate, key) as pacs:
        path = pacs.add(make_file(1))
        assert "pacs.ca_file" in fail(path, "storage")
        assert not pacs.requests
        use(ca_file=certificate)
        assert fetch_instance(path) == make_file(1)
        assert "pacs.ca_file" in fail(path.replace("127.0.0.1", "localhost"), "storage")
        use(ca_file=certificate, timeout_s=0.15, attempts=1)
        pacs.disturb(trickle)
        fail(path, "storage")


def test_client_certificate(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "pacs", "127.0.0.1")
    mine, my_key = make_certificate(tmp_path, "client", "client.example")
    with serve_tls(certificate, key, clients=mine) as pacs:
        path = pacs.add(make_file(1))
        use(ca_file=certificate, attempts=2)
        with pytest.raises(ImageError):
            fetch_instance(path)
        use(ca_file=certificate, client_certificate=mine, client_key=my_key, host=f"127.0.0.1:{pacs.port}")
        assert fetch_instance(path) == make_file(1)
    with pytest.raises(ConfigError, match="no certificate with its"):
        use(client_certificate=mine, client_key=key, host="h")


# --- Secrets


@contextmanager
def record_output(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect all log lines at DEBUG level, and the tracebacks that the block appends."""
    lines: list[str] = []
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("urllib3").setLevel(logging.DEBUG)
        yield lines
    lines += [f"{record.getMessage()} {record.exc_text} {record.__dict__}" for record in caplog.records]


def test_nothing_shows_credentials_or_the_query(
    pacs: DicomwebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = pacs.add(make_file(1, PatientName=QUERY))
    address = f"{pacs.address}?PatientName={QUERY}"
    runs: list[Callable[[], Any]] = [
        lambda: fetch_instance(path),
        lambda: fetch_metadata(path),
        lambda: list_uids(address),
        lambda: list(store(pacs.address, [make_file(3)])),
        lambda: list_uids(f"dicomweb+http://127.0.0.1:1/dicom-web?PatientName={QUERY}"),
    ]
    token = write_secret(tmp_path / "token", SECRET)
    attempts = 0
    with record_output(caplog) as lines:
        for settings in (
            {"credentials": write_netrc(tmp_path)},
            {"token_file": token, "host": f"127.0.0.1:{pacs.port}"},
        ):
            use(attempts=1, timeout_s=0.1, **settings)
            faults = [None, redirect("http://127.0.0.1:1/x"), break_connection]
            faults += [trickle] if "credentials" in settings else []
            faults += [lambda handler, status=status: handler.answer(status) for status in (401, 404, 500)]
            faults += [answer_with(b"x", "a/b", **{"X-Bad\r\nnot a header": "1"})]
            for fault in faults:
                for run in runs:
                    pacs.faults.clear()
                    if fault:
                        pacs.disturb(fault)
                    try:
                        lines.append(str(run()).replace(QUERY, "") if run is runs[1] else str(run()))
                    except RayCxrError:
                        lines.append(traceback.format_exc())
                        attempts += 1
            lines.append(f"{Access(PacsSettings(**settings))!r} {vars(PacsSettings(**settings))}")
            lines.append(pickle.dumps(Access(PacsSettings(**settings))).decode("latin-1"))
    assert attempts > 20
    assert {request.headers["Authorization"][:6] for request in pacs.requests} == {"Basic ", "Bearer"}
    output = "\n".join([*lines, *capfd.readouterr()])
    encoded = next(request for request in pacs.requests).headers["Authorization"].split()[1]
    for secret in (SECRET, USER, encoded):
        assert secret not in output
    assert f"PatientName={QUERY}" not in output


@pytest.mark.long
@pytest.mark.usefixtures("without_ray")
def test_command_shows_no_credentials_in_processes_and_files(
    pacs: DicomwebServer, tmp_path: Path, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pacs.login = f"{USER}:{SECRET}"
    pacs.add(make_file(1, PatientName=QUERY))
    write_netrc(tmp_path)
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    seen.add(f"{process.cmdline()} {process.environ()}")

    monkeypatch.chdir(tmp_path)
    watcher = threading.Thread(target=watch)
    watcher.start()
    arguments = ["prepare", f"{pacs.address}?PatientName={QUERY}", "--out", "out", "--size", "32"]
    _, out, error = command(*arguments, "--set", "pacs.credentials=netrc", "--set", "pacs.per_second=1000")
    done.set()
    watcher.join()
    assert any("sandbox" in text for text in seen), "no decoder was seen"
    files = [path.read_bytes().decode("latin-1") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    for text in (out, error, *seen, *files):
        assert SECRET not in text
        assert QUERY not in text
    for address in (
        f"dicomweb+https://{USER}:{SECRET}@pacs.example/a",
        f"dicomweb+http://pacs.example?PatientName={QUERY}",
    ):
        code, out, error = command("prepare", address, "--out", "other")
        assert (code, out, len(error.splitlines())) == (2, "", 1)
        assert SECRET not in error
        assert QUERY not in error


# --- Processes and threads


def _fetch_in_child(path: str, results: Any) -> None:
    results.put(fetch_instance(path))


def test_forked_process_opens_its_own_connection(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    fetch_instance(path)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_fetch_in_child, args=(path, results))
    child.start()
    assert results.get() == make_file(1)
    child.join(10)
    assert fetch_instance(path) == make_file(1)
    ports = [request.client for request in pacs.requests]
    assert ports[0] == ports[2] != ports[1]


def test_limits_of_requests(pacs: DicomwebServer) -> None:
    paths = [pacs.add(make_file(number)) for number in range(12)]
    active = 0
    most = 0
    lock = threading.Lock()

    def count(handler: Handler) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.01)
        with lock:
            active -= 1
        handler.answer(404)

    pacs.disturb(count)
    use(parallel=3)
    threads = [threading.Thread(target=fail, args=(path, "missing")) for path in paths]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most <= 3
    limiter = ProcessLimiter(8, per_second=100)
    started = time.monotonic()
    for _ in range(11):
        with limiter.slot():
            pass
    assert time.monotonic() - started >= 0.1


def test_each_attempt_takes_a_slot_of_the_cluster(pacs: DicomwebServer) -> None:
    path = pacs.add(make_file(1))
    slots: list[str] = []

    class Recorder:
        @contextmanager
        def slot(self) -> Iterator[None]:
            slots.append("start")
            yield
            slots.append("end")

    configure(PacsSettings(), Recorder())
    pacs.fail(503, times=2)
    fetch_instance(path)
    assert slots == ["start", "end"] * 3


# --- Listings


def fill(pacs: DicomwebServer, studies: int, images: int = 1) -> list[str]:
    numbers = [study * 100 + image for study in range(1, studies + 1) for image in range(images)]
    for number in numbers:
        pacs.add(make_file(number, number // 100, StudyDate=f"202601{number // 100:02d}"))
    return [f"1.2.3.{number}" for number in numbers]


@pytest.mark.parametrize("has_counts", [True, False])
@pytest.mark.parametrize("page_limit", [None, 1, 2])
def test_all_pages_are_listed_once(pacs: DicomwebServer, page_limit: int | None, has_counts: bool) -> None:
    uids = fill(pacs, studies=5, images=3)
    pacs.page_limit, pacs.has_counts = page_limit, has_counts
    use(page=2)
    assert list_uids(pacs.address) == uids
    assert list_uids(f"{pacs.address}?StudyDate=20260102-20260103&Modality=CR") == uids[3:9]
    assert list_uids(f"{pacs.address}?StudyDate=20260102-20260103&Modality=DX") == []
    assert list_uids(f"{pacs.address}?StudyDate=20300101") == []


def test_keys_of_a_study_select_studies_and_others_instances(pacs: DicomwebServer) -> None:
    """PACSs ignore keys of studies in a search for instances, or find nothing."""
    pacs.add(make_file(1, 1, Modality="DX", PatientName=QUERY))
    pacs.add(make_file(2, 1, Modality="SR", PatientName=QUERY))
    pacs.add(make_file(3, 2, Modality="CT"))
    assert list_uids(f"{pacs.address}?ModalitiesInStudy=DX") == ["1.2.3.1", "1.2.3.2"]
    assert list_uids(f"{pacs.address}?00080061=DX&00080060=DX") == ["1.2.3.1"]
    [row] = search(f"{pacs.address}?ModalitiesInStudy=DX&Modality=DX", Counter())
    assert dicomweb.get_text(row, "00100010") == QUERY, "values of the study are in the instance"


def test_more_results_than_the_number_of_instances_are_listed(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=1, images=3)
    study = {"0020000D": {"Value": ["1.2.1.1"]}, "00201208": {"Value": [1]}}
    pacs.disturb(answer_with(json.dumps([study]).encode(), "application/json"), where="/studies?")
    pacs.page_limit = 1
    assert list_uids(pacs.address) == uids


def test_number_of_instances_spares_requests(pacs: DicomwebServer) -> None:
    fill(pacs, studies=3)
    list_uids(pacs.address)
    assert len(pacs.requests) == 2 + 3


def test_instance_that_names_another_study_is_fetched_where_it_is_listed(pacs: DicomwebServer) -> None:
    [uid] = fill(pacs, studies=1)
    row = {**pacs.instances[uid], "0020000D": {"Value": ["1.2.9"]}}
    pacs.disturb(lambda handler: handler.answer(200, json.dumps([row]).encode()), where="/instances?")
    assert [dicomweb.get_text(row, "0020000D") for row in search(pacs.address, Counter())] == ["1.2.1.1"]


def then_serve(change: Callable[[], None]) -> Callable[[Handler], None]:
    """Answer as usual, after a change."""

    def behave(handler: Handler) -> None:
        change()
        handler._get(handler.path.partition("?")[0].removeprefix("/dicom-web"))

    return behave


def test_images_that_arrive_meanwhile_lose_none(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=7)
    use(page=3)

    def arrive() -> None:  # new studies come first, so the next page begins with studies that are known
        pacs.add(make_file(800, 8))
        pacs.instances = {"1.2.3.800": pacs.instances["1.2.3.800"], **pacs.instances}

    pacs.disturb(then_serve(arrive), where="offset=3", times=1)
    found = list_uids(pacs.address)
    assert set(uids) <= set(found)
    assert len(found) == len(set(found))


def test_study_deleted_before_its_instances_are_listed_shifts_no_page(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=7)
    use(page=2, parallel=1)
    pacs.disturb(then_serve(lambda: pacs.instances.pop(uids[0], None)), where="/instances?")
    gaps: Counter[str] = Counter()
    assert list_uids(pacs.address, gaps) == uids[1:]
    assert sum(gaps.values()) == 1


@pytest.mark.parametrize("page", [2, 3, 7])
def test_server_that_cuts_before_it_applies_the_offset(pacs: DicomwebServer, page: int) -> None:
    uids = fill(pacs, studies=7, images=2)
    pacs.cuts_first = True
    use(page=page)
    assert list_uids(pacs.address) == uids


def test_instances_that_the_server_counts_but_does_not_list(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=2, images=5)
    pacs.ignores_offset = True
    rows = [pacs.instances[uid] for uid in uids[:2]]
    pacs.disturb(answer_with(json.dumps(rows).encode(), "application/json"), where="1.2.1.1/instances?")
    gaps: Counter[str] = Counter()
    assert list_uids(pacs.address, gaps) == uids[:2] + uids[5:]
    assert gaps == {dicomweb.UNLISTED: 3}


def test_server_that_ignores_the_offset(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=3)
    pacs.ignores_offset = True
    use(page=10)
    assert list_uids(pacs.address) == uids, "the page is complete"
    for page, limit in ((3, None), (2, None), (10, 2)):
        pacs.page_limit = limit
        use(page=page)
        with pytest.raises(InputError, match="not be complete"):
            list_uids(pacs.address)


def test_listing_that_never_ends_is_an_error(pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "MAX_LISTED", 50)
    numbers = iter(range(1, 10_000))

    def invent(handler: Handler) -> None:
        rows = [{"0020000D": {"Value": [f"1.2.{next(numbers)}"]}} for _ in range(10)]
        handler.answer(200, json.dumps(rows).encode())

    pacs.disturb(invent, where="/studies?")
    pacs.fail(204, where="/instances?", times=1000)
    with pytest.raises(InputError, match="more than 50"):
        list_uids(pacs.address)
    assert len(pacs.requests) < 100


@pytest.mark.parametrize("uid", ["1.2/../../admin", "1.2?x=1", "../1", "1." + "2" * 70, "", 1.5e300, None, ["1.2"], {}])
def test_objects_with_wrong_uids_are_counted(pacs: DicomwebServer, uid: Any) -> None:
    uids = fill(pacs, studies=2)
    pacs.instances["x"] = {**pacs.instances[uids[0]], "00080018": {"Value": [uid]}}
    study = {**pacs.instances[uids[1]], "0020000D": {"Value": [uid]}}
    pacs.instances["y"], pacs.instances["z"] = study, {**study, "00100020": {"Value": ["another"]}}
    left_out: Counter[str] = Counter()
    assert list_uids(pacs.address, left_out) == uids
    assert sum(left_out.values()) == 2
    assert all("/../" not in request.path for request in pacs.requests)


@pytest.mark.parametrize("level", ["0020000D", "0020000E"])
def test_instances_of_two_studies_or_series_with_one_uid_are_both_listed(pacs: DicomwebServer, level: str) -> None:
    [first, second] = fill(pacs, studies=2)
    pacs.instances["x"] = {**pacs.instances[first], level: {"Value": ["1.2.1.2" if level.endswith("D") else "1.9"]}}
    assert sorted(list_uids(pacs.address)) == [first, first, second]


def test_study_deleted_meanwhile_is_counted(pacs: DicomwebServer) -> None:
    uids = fill(pacs, studies=3)
    pacs.fail(404, where="/studies/1.2.1.2/")
    left_out: Counter[str] = Counter()
    assert list_uids(pacs.address, left_out) == [uids[0], uids[2]]
    assert sum(left_out.values()) == 1


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[1]", b'"x"', b"3", b"[[]]", b'[{"0020000D": 1}, 2]', b"[" * 100_000, b"\xff\xfe", b"[{}"],
)
def test_listing_that_is_no_dicom_json_is_an_error(pacs: DicomwebServer, body: bytes) -> None:
    pacs.disturb(answer_with(body, "application/json"))
    with pytest.raises(InputError, match="not DICOM JSON"):
        list_uids(f"{pacs.address}?PatientName={QUERY}")


@pytest.mark.parametrize("value", [None, 1, "x", [], {"Value": None}, {"Value": 3}, {"Value": [None]}, {"Value": {}}])
def test_values_of_wrong_types_are_passed_on(pacs: DicomwebServer, value: Any) -> None:
    [uid] = fill(pacs, studies=1)
    pacs.instances[uid]["00100010"] = pacs.instances[uid]["00101010"] = value
    [row] = search(pacs.address, Counter())
    assert dicomweb.get_text(row, "00101010") == ""


def test_unavailable_pacs_cannot_be_searched(pacs: DicomwebServer) -> None:
    fill(pacs, studies=2)
    use(attempts=2)
    pacs.fail(503, times=4, where="/instances")
    with pytest.raises(RayCxrError) as caught:
        list_uids(f"{pacs.address}?PatientName=")
    assert caught.value.exit_code == 1
    assert "PatientName" not in str(caught.value)


# --- Storing


def failed(reason: Any, uid: str = "1.2.3.5") -> Any:
    return {"00081198": {"Value": [{"00081155": {"Value": [uid]}, "00081197": {"Value": [reason]}}]}}


def stored(uid: str = "1.2.3.5", warning: Any = None) -> Any:
    return {"00081199": {"Value": [{"00081155": {"Value": [uid]}, "00081196": {"Value": [warning]}}]}}


@pytest.mark.parametrize(
    ("status", "content", "expected", "reason"),
    [
        (200, stored(), "accepted", None),
        (200, stored("1.2.3.55"), "unavailable", None),
        (200, {"00081199": {"Value": [{}]}}, "unavailable", None),
        (200, b"", "unavailable", None),
        (200, b"<html>Please log in</html>", "unavailable", None),
        (200, stored(warning=0xB000), "warned", 0xB000),
        (202, stored(warning=0xB007), "warned", 0xB007),
        (202, stored(), "warned", None),
        (202, b"", "unavailable", None),
        (202, failed(0xA700), "refused", 0xA700),
        (200, failed(0x0122), "refused", 0x0122),
        (409, failed(0x0110), "refused", 0x0110),
        (409, failed(0x0111), "accepted", 0x0111),
        (409, failed(0x0111, "1.2.3.55"), "refused", 0x0111),
        (409, failed("x"), "refused", None),
        (409, {"00081198": {"Value": 3}}, "refused", None),
        (409, b"[3]", "refused", None),
        (400, b"", "refused", None),
        (415, b"", "refused", None),
        (413, b"", "refused", None),
        (401, b"", "unavailable", None),
        (404, b"", "unavailable", None),
        (503, b"", "unavailable", None),
    ],
)
def test_outcome_of_a_document(
    pacs: DicomwebServer, status: int, content: Any, expected: str, reason: int | None
) -> None:
    use(attempts=1)
    pacs.outcome = lambda dataset: (status, content)
    [outcome] = store(pacs.address, [make_file(5)])
    assert (outcome.sop_instance_uid, outcome.status, outcome.reason) == ("1.2.3.5", expected, reason)
    assert outcome.message.splitlines() == [outcome.message]


def test_document_that_the_answer_does_not_name_is_read_back(pacs: DicomwebServer) -> None:
    use(attempts=1)
    document = make_file(5)
    pacs.outcome = lambda dataset: (200, b"<xml/>")
    pacs.add(document)
    assert [outcome.status for outcome in store(pacs.address, [document])] == ["accepted"]
    pacs.add(make_file(5, PatientID="other"))
    assert [outcome.status for outcome in store(pacs.address, [document])] == ["unavailable"]


def test_documents_are_stored_one_by_one_and_retried(pacs: DicomwebServer) -> None:
    documents = [make_file(number) for number in (1, 2, 3)]
    outcomes = store(pacs.address, iter(documents))
    assert next(outcomes).status == "accepted"
    assert list(pacs.files) == ["1.2.3.1"]
    pacs.fail(503)
    pacs.disturb(break_connection, times=1)
    assert [outcome.status for outcome in outcomes] == ["accepted"] * 2
    assert list(pacs.files.values()) == documents
    with pytest.raises(InputError, match="query"):
        store(f"{pacs.address}?StudyDate=2026", documents)
