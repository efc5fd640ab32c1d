"""Documents sent to a PACS: to pynetdicom's C-STORE server in a thread, and to a DICOMweb server of the tests."""

from __future__ import annotations

import copy
import io
import itertools
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pydicom
import pytest
from dicomweb_server import DicomwebServer
from pydicom.uid import (
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from sr_site import IDENTIFYING, Command, Site

from ray_cxr.config import PacsSettings
from ray_cxr.errors import OutputError
from ray_cxr.reporting import dicom_sr, sending
from ray_cxr.storage import dicomweb_http, dimse, run_folder

QUICK = ("--set", "per_second=1000", "--set", "timeout_s=2")


@dataclass
class DimsePacs:
    """A C-STORE server: `answers` are its next statuses, None aborts the association; then it accepts."""

    classes: tuple[str, ...] = (ComprehensiveSRStorage, SecondaryCaptureImageStorage)
    answers: list[int | None] = field(default_factory=list)
    delay_s: float = 0.0
    stored: dict[str, pydicom.Dataset] = field(default_factory=dict)
    requests: int = 0
    callers: list[str] = field(default_factory=list)
    syntax: str | None = None
    connections: int = 0
    stalled: threading.Event | None = None  # until it is set, documents are not read

    def start(self, **required: Any) -> str:
        entity = AE(ae_title="ARCHIVE")
        for name, value in required.items():
            setattr(entity, name, value)
        for sop_class in self.classes:
            entity.add_supported_context(sop_class, self.syntax)
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store), (evt.EVT_ACCEPTED, self._accept)]
        handlers += [(evt.EVT_DATA_RECV, self._stall), (evt.EVT_CONN_OPEN, self._count)]
        self.server: Any = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return f"dimse://ARCHIVE@localhost:{self.server.server_address[1]}"

    def _count(self, event: Any) -> None:
        self.connections += 1

    def _stall(self, event: Any) -> None:
        if self.stalled is not None and event.data[:1] == b"\x04":  # P-DATA-TF
            self.stalled.wait(20)

    def _accept(self, event: Any) -> None:
        self.callers.append(event.assoc.requestor.ae_title)

    def _store(self, event: Any) -> int:
        self.requests += 1
        time.sleep(self.delay_s)
        answer = self.answers.pop(0) if self.answers else 0
        if answer is None:
            event.assoc.abort()
            return 0
        if answer in (0, 0xB000):
            document = event.dataset
            document.file_meta = event.file_meta
            self.stored[document.SOPInstanceUID] = document
        return answer


@pytest.fixture
def pacs() -> Iterator[DimsePacs]:
    pacs = DimsePacs()
    yield pacs
    threading.Thread(target=pacs.server.shutdown, daemon=True).start()  # takes half a second


@pytest.fixture
def web() -> Iterator[DicomwebServer]:
    with DicomwebServer() as server:
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The documents of three studies with six images, and two captures."""
    site = Site(tmp_path_factory.mktemp("exported"))
    for number in range(6):
        site.add(number, number // 2)
    site.write()
    site.draw_maps()
    done = dicom_sr.export_sr(site.scores, site.out, with_heatmaps=True)
    assert (done.reports, done.captures) == (3, {"captured": 2})
    return site


@pytest.fixture
def site(exported: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A copy of the documents, and clients that do not wait before another attempt."""
    monkeypatch.setattr(dimse, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(dicomweb_http, "BACKOFF_S", 0.01)
    site = copy.copy(exported)
    site.home, site.out = tmp_path, tmp_path / "reports"
    shutil.copytree(exported.out, site.out)
    return site


def send(site: Site, command: Command, address: str, *more: str, code: int = 0) -> tuple[str, str]:
    out, err = site.run(command, "--heatmaps", "--send", address, *QUICK, *more, code=code)
    assert "Traceback" not in err
    assert not any(word in out + err for word in IDENTIFYING)
    return out, err


def statuses(site: Site) -> list[str]:
    return pq.read_table(site.out / "sent.parquet")["status"].to_pylist()


def read_uids(site: Site) -> set[str]:
    return {path.stem for path in site.out.rglob("*.dcm")}


def test_documents_and_heat_maps_are_stored_once_over_one_association(
    site: Site, command: Command, pacs: DimsePacs
) -> None:
    address = pacs.start()
    out, _ = send(site, command, address, "--set", "calling_aet=NIGHT")
    uids = read_uids(site)
    assert set(pacs.stored) == uids
    assert len(uids) == 5
    assert pacs.callers == ["NIGHT"]
    for uid, document in pacs.stored.items():
        (path,) = site.out.rglob(f"{uid}.dcm")
        for element in pydicom.dcmread(path):
            assert document[element.tag].value == element.value
    assert statuses(site) == ["accepted"] * len(uids)
    assert "stored earlier" in out
    send(site, command, address)
    assert pacs.requests == len(uids)
    send(site, command, address, "--resend")
    assert pacs.requests == 2 * len(uids)
    assert set(pacs.stored) == uids


def test_documents_are_stored_by_stow(site: Site, command: Command, web: DicomwebServer) -> None:
    web.fail(503, times=2)
    send(site, command, web.address)
    uids = read_uids(site)
    assert set(web.files) == uids
    for uid, data in web.files.items():
        (path,) = site.out.rglob(f"{uid}.dcm")
        assert data == path.read_bytes()
    count = len(web.requests)
    send(site, command, f"{web.address}/")
    assert len(web.requests) == count
    # Another destination has nothing yet, and the table keeps both.
    web.files.clear()
    send(site, command, web.address.replace("127.0.0.1", "localhost"))
    assert set(web.files) == uids
    assert len(statuses(site)) == 2 * len(uids)


@pytest.mark.long
def test_server_with_implicit_vr_only_gets_the_same_values(site: Site, command: Command, pacs: DimsePacs) -> None:
    pacs.syntax = ImplicitVRLittleEndian
    send(site, command, pacs.start())
    for uid, document in pacs.stored.items():
        (path,) = site.out.rglob(f"{uid}.dcm")
        ours = pydicom.dcmread(path)
        assert document.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
        assert document.PatientName == ours.PatientName
        assert document.get("PixelData") == ours.get("PixelData")
    assert set(pacs.stored) == read_uids(site)


def test_warned_and_refused_documents_are_listed_and_refused_ones_sent_again(
    site: Site, command: Command, pacs: DimsePacs
) -> None:
    address = pacs.start()
    pacs.answers = [0xB000, 0xA900]
    out, err = send(site, command, address, code=3)
    assert statuses(site) == ["warned", "refused", *["accepted"] * 3]
    assert "0xA900" in out
    assert "1 of 5 documents are not stored" in err
    assert pq.read_table(site.out / "sent.parquet")["reason"].to_pylist() == [0xB000, 0xA900, None, None, None]
    pacs.requests = 0
    send(site, command, address)
    assert pacs.requests == 1
    assert statuses(site) == ["warned", *["accepted"] * 4]


@pytest.mark.long
def test_busy_server_and_broken_association_are_tried_again(site: Site, command: Command, pacs: DimsePacs) -> None:
    pacs.answers = [0xA700, None, 0, None]
    send(site, command, pacs.start())
    assert set(pacs.stored) == read_uids(site)
    assert len(pacs.callers) == 3


@pytest.mark.long
def test_server_that_does_not_answer_in_time_is_left(site: Site, command: Command, pacs: DimsePacs) -> None:
    pacs.delay_s = 1.0
    out, _ = send(site, command, pacs.start(), "--set", "timeout_s=0.2", "--set", "attempts=2", code=3)
    assert "did not answer in time" in out
    assert statuses(site) == ["unavailable"] * 5
    pacs.delay_s = 0.0
    send(site, command, f"dimse://ARCHIVE@localhost:{pacs.server.server_address[1]}")
    assert set(pacs.stored) == read_uids(site)


def test_server_that_stops_reading_is_left(pacs: DimsePacs) -> None:
    address, pacs.stalled = pacs.start(), threading.Event()
    document = pydicom.Dataset()
    document.file_meta = pydicom.dataset.FileMetaDataset()
    document.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    document.SOPClassUID = document.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    document.SOPInstanceUID = document.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    document.add_new("PixelData", "OB", bytes(16 << 20))  # more than the buffers of a connection hold
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    answers: list[str] = []

    def store() -> None:
        settings = PacsSettings(timeout_s=0.2, attempts=1)
        answers.extend(answer.status for answer in dimse.store(address, [file.getvalue()] * 2, settings))

    thread = threading.Thread(target=store, daemon=True)
    thread.start()
    thread.join(10)
    pacs.stalled.set()
    assert answers == ["unavailable"] * 2


@pytest.mark.long
def test_requests_are_limited(site: Site, command: Command, pacs: DimsePacs, web: DicomwebServer) -> None:
    for address in (pacs.start(), web.address):
        start = time.monotonic()
        send(site, command, address, "--set", "per_second=10")
        assert time.monotonic() - start > 0.4  # four intervals between five documents


def test_refused_by_stow(site: Site, command: Command, web: DicomwebServer) -> None:
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA900]}}]}}
    web.outcome = lambda document: (409, failed)
    out, _ = send(site, command, web.address, code=3)
    assert statuses(site) == ["refused"] * 5
    assert "0xa900" in out


def test_server_that_stops_gets_the_others_later(site: Site, command: Command, web: DicomwebServer) -> None:
    requests = 0

    def stop(document: pydicom.Dataset) -> tuple[int, Any] | None:
        nonlocal requests
        requests += 1
        return None if requests == 1 else (503, {})

    web.outcome = stop
    out, err = send(site, command, web.address, "--set", "attempts=1", code=3)
    assert statuses(site) == ["accepted"] + ["unavailable"] * 4
    assert requests == 4
    assert "1 unavailable: not tried" in out
    assert "4 of 5" in err
    web.outcome = None
    send(site, command, web.address)
    assert set(web.files) == read_uids(site)
    assert statuses(site) == ["accepted"] * 5


def test_second_send_from_one_folder_is_refused(site: Site, web: DicomwebServer) -> None:
    with run_folder.lock(site.out, "export-sr --send"), pytest.raises(OutputError):
        sending.send(site.out, web.address, PacsSettings(per_second=1000.0))
    assert not web.requests


def test_killed_run_does_not_send_again(
    site: Site, command: Command, web: DicomwebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = sending.dicomweb.store, sending._Record.write
    is_killed = False

    def stop_after_two(address: str, documents: Iterator[bytes]) -> Iterator[Any]:
        nonlocal is_killed
        answers = store(address, documents)
        yield from itertools.islice(answers, 2)
        next(answers)  # the PACS has it, and this program does not know
        is_killed = True
        raise SystemExit

    def write_while_alive(record: Any) -> None:
        if not is_killed:
            write(record)

    with monkeypatch.context() as patch:
        patch.setattr(sending, "_FLUSH_S", 0.0)
        patch.setattr(sending.dicomweb, "store", stop_after_two)
        patch.setattr(sending._Record, "write", write_while_alive)
        with pytest.raises(SystemExit):
            sending.send(site.out, web.address, PacsSettings(per_second=1000.0), with_heatmaps=True)
    assert len(web.files) == len(web.requests) == 3
    send(site, command, web.address)
    assert len(web.files) == 5
    assert len(web.requests) == 6


def correct(site: Site, name: str) -> None:
    path = min(site.out.glob("*.dcm"))
    document = pydicom.dcmread(path)
    document.PatientName = name
    document.save_as(path)


def accept_without_storing(document: pydicom.Dataset) -> tuple[int, Any]:
    return 200, {"00081199": {"Value": [{"00081155": {"Value": [document.SOPInstanceUID]}}]}}


def test_corrected_document_is_accepted_only_if_the_pacs_has_it(
    site: Site, command: Command, web: DicomwebServer
) -> None:
    send(site, command, web.address)
    correct(site, "Corrected")
    web.outcome = lambda document: (503, {})
    send(site, command, web.address, "--set", "attempts=1", code=3)
    web.outcome = accept_without_storing
    out, _ = send(site, command, web.address)
    assert sorted(statuses(site)) == ["accepted"] * 4 + ["warned"]
    assert "may keep the earlier version" in out
    send(site, command, web.address, "--resend")
    assert sorted(statuses(site)) == ["accepted"] * 4 + ["warned"]
    web.outcome = None
    send(site, command, web.address, "--resend")
    assert statuses(site) == ["accepted"] * 5


@pytest.mark.long
@pytest.mark.parametrize("answer", [0, 0x0111])
def test_corrected_document_is_sent_again_by_c_store(
    site: Site, command: Command, pacs: DimsePacs, answer: int
) -> None:
    address = pacs.start()
    send(site, command, address)
    correct(site, "Corrected")
    pacs.answers = [answer]
    send(site, command, address)
    assert pacs.requests == 6
    assert sorted(statuses(site)) == ["accepted"] * 4 + ["warned"]


@pytest.mark.parametrize(
    ("required", "answers"),
    [({"require_called_aet": True}, "no AE title WRONG"), ({"require_calling_aet": ["OTHER"]}, "title RAYCXR")],
)
def test_wrong_titles_are_named(
    site: Site,
    command: Command,
    pacs: DimsePacs,
    monkeypatch: pytest.MonkeyPatch,
    required: dict[str, Any],
    answers: str,
) -> None:
    monkeypatch.setattr(dimse, "_BACKOFF_S", -1.0)  # a wait before another attempt would be an error
    address = pacs.start(**required)
    if "require_called_aet" in required:
        address = address.replace("ARCHIVE", "WRONG")
    out, _err = send(site, command, address, code=3)
    assert answers in out
    assert statuses(site) == ["unavailable"] * 5
    assert pacs.connections == 1


def test_server_that_accepts_no_reports_stores_the_captures(site: Site, command: Command, pacs: DimsePacs) -> None:
    pacs.classes = (SecondaryCaptureImageStorage,)
    out, _ = send(site, command, pacs.start(), code=3)
    assert "accepts no Comprehensive SR Storage" in out
    assert set(pacs.stored) == {path.stem for path in (site.out / "heatmaps").iterdir()}


def test_server_that_accepts_nothing(site: Site, command: Command, pacs: DimsePacs) -> None:
    pacs.classes = ("1.2.840.10008.1.1",)
    out, _ = send(site, command, pacs.start(), code=3)
    assert "accepts no Comprehensive SR Storage" in out
    assert statuses(site) == ["refused"] * 5


@pytest.mark.long
def test_closed_and_foreign_ports_are_named(site: Site, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        out, _ = send(site, command, f"dimse://ARCHIVE@127.0.0.1:{port}", code=3)
        thread.join()
        assert "does not answer as a DICOM server" in out
    out, _ = send(site, command, f"dimse://ARCHIVE@127.0.0.1:{port}", "--set", "attempts=2", code=3)
    assert "cannot be reached (connection refused)" in out
    out, _ = send(site, command, "dimse://ARCHIVE@host.invalid:104", "--set", "attempts=1", code=3)
    assert "host.invalid is unknown" in out


@pytest.mark.parametrize(
    "address",
    [
        "https://host/dicom-web",
        "dimse://host:104",
        "dimse://ARCHIVE@host",
        "dimse://MORE_THAN_16_CHARS@host:104",
        "dimse://ARCHIVE:secret@host:104",
        "dimse://ARCHIVE@host:104/path",
        "dicomweb+http://host/dicom-web",
        "dicomweb+https://host/dicom-web?PatientID=secret",
        "dicomweb+https://user:secret@host/dicom-web",
    ],
)
def test_wrong_addresses_are_refused_before_anything_is_written(site: Site, command: Command, address: str) -> None:
    shutil.rmtree(site.out)
    _, err = send(site, command, address, code=2)
    assert "secret" not in err
    assert not site.out.exists()


def test_headers_come_from_the_metadata_of_a_pacs(tmp_path: Path, command: Command, web: DicomwebServer) -> None:
    site = Site(tmp_path)
    other = pydicom.Dataset()
    other.PatientID, other.IssuerOfPatientID = "X1", "Ö"
    names = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Zweistein^Jörg", "OtherPatientIDsSequence": [other]}
    for number, path in enumerate([site.add(0, 1, **names), site.add(1, 2, PatientAge="old"), site.add(2, 2)]):
        site.paths[number] = web.add(path.read_bytes())
    del web.instances[site.paths[2].rpartition("/")[2]]
    site.write()
    site.run(command, code=3)
    assert all(request.path.endswith("/metadata") for request in web.requests)
    documents = site.documents()
    assert str(documents["1"].PatientName) == "Zweistein^Jörg"
    assert documents["1"].OtherPatientIDsSequence[0].IssuerOfPatientID == "Ö"
    assert (documents["2"].PatientBirthDate, "PatientAge" in documents["2"]) == ("19340506", False)
    assert documents["2"].CompletionFlag == "PARTIAL"
    assert [row["reason"] and row["reason"].partition(":")[0] for row in site.images()] == [None, None, "missing"]


@pytest.mark.long
def test_replaced_report_that_was_not_sent_is_counted(
    exported: Site, site: Site, command: Command, pacs: DimsePacs
) -> None:
    address, new = pacs.start(), Site(site.home / "new")
    new.home.mkdir()
    new.model[1]["digest"] = "e2" * 32
    new.paths, new.studies = exported.paths, exported.studies
    new.write()
    out, _ = new.run(command, "--replaces", site.out, "--send", address, *QUICK)
    assert "3 reports name an earlier report that was not sent there" in out
    send(site, command, address)
    out, _ = new.run(command, "--replaces", site.out, "--send", address, "--resend", *QUICK)
    assert "that was not sent" not in out
