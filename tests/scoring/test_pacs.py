"""`score` and `prepare` of a search of a PACS: rows, resuming, limits, errors, and what no output may contain."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from dicomweb_server import DicomwebServer
from nodes import wait_until
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from score_folders import count_parts, modification_times, start_command

from ray_cxr import cluster
from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError
from ray_cxr.scoring.actors import make_pseudonym
from ray_cxr.storage import pacs_workers
from ray_cxr.storage.dicomweb import configure

Command = Callable[..., tuple[int, str, str]]
SECRET = "20260105-20260106"
SEARCH = f"?StudyDate={SECRET}&ModalitiesInStudy=DX"
FAST = ("--precision", "fp32", "--set", "batch_size=2", "--set", "rows_per_file=4", "--set", "pacs.per_second=1000")


def make_instance(number: int, sop_class: str = DigitalXRayImageStorageForPresentation, **changes: Any) -> bytes:
    """Return a DICOM file; two instances make a study, and an odd number is a lateral."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.{number // 2}", f"1.2.{number // 2}.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number // 2}.1.{number}"
    ds.StudyDate, ds.PatientID, ds.PatientSex, ds.PatientAge = "20260105", f"P{number // 2}", "F", f"{40 + number:03d}Y"
    ds.PatientName, ds.Modality, ds.InstanceNumber = "Doe^Jane", "DX", number
    ds.ViewPosition = "LL" if number % 2 else "PA"
    ds.Rows = ds.Columns = 48
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = np.random.default_rng(number).integers(0, 256, (48, 48), dtype=np.uint8).tobytes()
    for name, value in changes.items():
        setattr(ds, name, value)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.fixture
def pacs() -> Iterator[DicomwebServer]:
    """A PACS with 6 radiographs in 3 studies, an SR and a Secondary Capture."""
    with DicomwebServer() as server:
        for number in range(6):
            server.add(make_instance(number))
        server.add(make_instance(1, BasicTextSRStorage, Modality="SR", SOPInstanceUID="1.2.0.1.90"))
        server.add(make_instance(1, SecondaryCaptureImageStorage, Modality="OT", SOPInstanceUID="1.2.0.1.91"))
        yield server


def read_rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "scores").to_pylist()


def count_searches(pacs: DicomwebServer) -> int:
    return sum("/studies?" in request.path for request in pacs.requests)


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_search_is_scored_once_and_frozen(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    arguments = ["score", tiny_bundle.path, "--images", pacs.address + SEARCH, "--out", tmp_path / "out", *FAST]
    # One instance stays unavailable, and two requests find a busy server.
    pacs.fail(500, times=1, where="/instances/1.2.1.1.2")
    pacs.fail(503, times=2, where="/instances/1.2.2.1.4", Retry_After="0")
    code, printed, logged = command(*arguments, "--set", "pacs.attempts=1")
    assert code == 0
    rows = read_rows(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [f"1.2.{n // 2}.1.{n}" for n in range(6)]
    assert [row["error_code"] for row in rows] == [None, None, "storage", None, "storage", None]
    assert [row["patient_id"] for row in rows] == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert [row["study_id"] for row in rows] == [f"1.2.{n // 2}" for n in range(6)]
    assert [row["age"] for row in rows] == [40.0, 41.0, 42.0, 43.0, 44.0, 45.0]
    assert {row["sex"] for row in rows} == {"F"}
    assert [row["view"] for row in rows] == ["PA", "LATERAL"] * 3
    assert rows[0]["path"] == f"{pacs.address}/studies/1.2.0/series/1.2.0.1/instances/1.2.0.1.0"
    assert "1 SR" in printed
    assert "1 Secondary Capture" in printed
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for text in (printed, logged, *(path.read_bytes().decode("latin-1") for path in files)):
        assert SECRET not in text
        assert "Doe" not in text

    pacs.add(make_instance(7))  # arrives after the listing
    searches = count_searches(pacs)
    code, _, _ = command(*arguments, "--retry-errors")
    assert code == 0
    assert [row["error_code"] for row in read_rows(tmp_path / "out")] == [None] * 6
    assert count_searches(pacs) == searches

    empty = [*arguments[:3], f"{pacs.address}?PatientID=nobody", "--out", tmp_path / "next", *FAST]
    for more in ([], ["--set", "select=frontal"]):
        code, printed, _ = command(*empty, "--skip-scored", tmp_path / "out", *more)
        assert code == 0
        assert "nothing to score" in printed
        assert not (tmp_path / "next").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_limit_ends_the_search_and_pseudonyms_replace_ids(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    key = tmp_path / "key"
    key.write_text("sixteen bytes or more")
    named = [f"pseudonym_key={key}", "pacs.parallel=1", "pacs.page=1"]
    options = [*FAST, *(word for text in named for word in ("--set", text))]
    arguments = ["score", tiny_bundle.path, "--images", f"{pacs.address}?PatientID=P1", "--out", tmp_path / "out"]
    assert command(*arguments, "--limit", 1, *options)[0] == 0
    (row,) = read_rows(tmp_path / "out")
    assert row["patient_id"] == make_pseudonym(b"sixteen bytes or more", "P1")
    assert row["study_id"] == make_pseudonym(b"sixteen bytes or more", "1.2.1")
    assert "P1" not in (tmp_path / "out" / "settings.json").read_text()
    assert "P1" not in (tmp_path / "out" / "run.json").read_text()
    code, _, error = command(*arguments, *options)
    assert code == 2
    assert "limit" in error


@pytest.mark.usefixtures("without_ray")
def test_a_search_that_finds_nothing_or_is_refused_is_one_line(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    arguments = ["score", tiny_bundle.path, "--out", tmp_path / "out", "--images"]
    code, _, error = command(*arguments, f"{pacs.address}?PatientID=nobody-{SECRET}")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "no radiographs" in error
    pacs.login = "reader:password"
    code, _, refused = command(*arguments, pacs.address + SEARCH)
    assert (code, len(refused.splitlines())) == (2, 1)
    assert "pacs.credentials" in refused
    code, _, away = command(*arguments, f"dicomweb+http://127.0.0.1:1/{SEARCH}", "--set", "pacs.attempts=1")
    assert (code, len(away.splitlines())) == (1, 1)
    assert SECRET not in error + refused + away
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.usefixtures("without_ray")
def test_heat_maps_are_drawn_over_images_of_a_pacs(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    arguments = ["score", tiny_bundle.path, "--images", pacs.address + SEARCH, "--out", tmp_path / "out", *FAST]
    assert command(*arguments)[0] == 0
    pacs.fail(500, where="/instances/1.2.1.1.2")
    assert command(*arguments, "--heatmaps", 1, "--set", "pacs.attempts=1")[0] == 0
    parts = sorted((tmp_path / "out" / "heatmaps").glob("*.parquet"))
    maps = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [row["image_id"] for row in maps] == [row["image_id"] for row in read_rows(tmp_path / "out")]
    assert [row["error_code"] for row in maps] == [None, None, "storage", None, None, None]
    assert all((tmp_path / "out" / "heatmaps" / row["overlay"]).exists() for row in maps if row["overlay"])
    assert command(*arguments, "--heatmaps", 1, "--retry-errors")[0] == 0
    maps = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [row["error_code"] for row in maps] == [None] * 6


@pytest.mark.usefixtures("without_ray")
def test_dry_run_states_requests_and_bytes(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    arguments = ["score", tiny_bundle.path, "--images", pacs.address + SEARCH, "--out", tmp_path / "out", *FAST]
    code, printed, _ = command(*arguments, "--dry-run", "--set", "pacs.per_second=50")
    assert code == 0
    assert "PACS: 6 requests" in printed
    assert not (tmp_path / "out").exists()


def test_settings_of_a_pacs_are_checked_for_all_images(tiny_bundle: Any, tmp_path: Path, command: Command) -> None:
    code, _, error = command("score", tiny_bundle.path, "--images", tmp_path, "--out", "o", "--set", "pacs.ca_file=no")
    assert code == 2
    assert "pacs.ca_file" in error


def test_a_pacs_that_no_node_reaches_is_left_to_the_rows(pacs: DicomwebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    image = next(iter(pacs.instances))
    path = f"{pacs.address}/studies/1.2.0/series/1.2.0.1/instances/{image}"
    nodes, problems = [{"NodeManagerAddress": "192.0.2.1"}], ["no route"]
    monkeypatch.setattr(cluster, "list_nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "query_nodes", lambda *_: list(zip(nodes, problems, strict=True)))
    monkeypatch.setattr(cluster, "list_alive", lambda: nodes)
    access = pacs_workers.PacsAccess(PacsSettings(attempts=1, per_second=1000))
    pacs_workers._require_nodes(access, path)
    assert not pacs.requests, "a single node needs no check"
    monkeypatch.setattr(cluster, "list_alive", lambda: nodes * 2)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 cannot fetch"):
        pacs_workers._require_nodes(access, path)
    pacs.fail(500, where="/series/")
    pacs_workers._require_nodes(access, path)
    configure(PacsSettings())


@pytest.mark.parametrize("secret", ["Doe^Jane", "it's pa  Qz7"])
def test_no_argument_error_and_no_next_line_shows_a_query(
    pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command, secret: str
) -> None:
    address = f"{pacs.address}?PatientName={secret}"
    login = f"dicomweb+https://user:{secret}@pacs.example/dicom-web"
    for words in (
        ["prepare", address, login, "--out", "o"],
        ["score", tiny_bundle.path, login, address],
        ["score", tiny_bundle.path, "--images", address, "--out", "o", "--limit", login],
        ["score", tiny_bundle.path, "--image", address],
        ["score", tiny_bundle.path, f"--images={address}", "--set", f"pacs.{address}", "--out", "o"],
        [login],
        ["manifest", address, "--out", tmp_path / "m"],
        ["score", tiny_bundle.path, f"--images={login}", "--out", "o"],
    ):
        code, printed, error = command(*words)
        assert code == 2
        assert secret.split()[-1] not in printed + error
    code, printed, _ = command(
        "prepare", f"{pacs.address}?PatientName=Doe%5EJane", "--out", tmp_path / "o", "--dry-run"
    )
    assert (code, "Jane" in printed) == (0, False)


def test_a_table_of_labels_finds_its_images_in_a_pacs(pacs: DicomwebServer, tmp_path: Path, command: Command) -> None:
    table, out = tmp_path / "labels.csv", tmp_path / "m.parquet"
    table.write_text("image,Mass,Nodule\n1.2.0.1.0,1,0\n1.2.1.1.3,0,0\n1.2.9.1.9,0,1\n")
    code, printed, _ = command("manifest", table, "--images", pacs.address + SEARCH, "--out", out)
    assert code == 0
    assert pq.read_table(out)["path"].to_pylist() == [
        f"{pacs.address}/studies/1.2.0/series/1.2.0.1/instances/1.2.0.1.0",
        f"{pacs.address}/studies/1.2.1/series/1.2.1.1/instances/1.2.1.1.3",
        None,
    ]
    assert "1 SR" in printed


@pytest.mark.ray
def test_workers_share_limits_and_survive_a_restart_of_the_pacs(
    shared_ray: None, pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    for number in range(6, 30):
        pacs.add(make_instance(number))
    lock, running, most = threading.Lock(), 0, 0

    def answer_slowly(handler: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        handler._get(handler.path.removeprefix("/dicom-web"))

    def restart() -> None:
        while len(pacs.requests) < 30:
            time.sleep(0.01)
        pacs.__exit__()
        time.sleep(0.3)
        pacs.__enter__()

    pacs.fail(503, times=3, where="/instances/1.2.1.1.3", Retry_After="0")  # as many as attempts
    for number in range(10, 30, 4):
        pacs.fail(503, where=f".1.{number}", Retry_After="0")
    pacs.disturb(answer_slowly, where="/series/")
    limits = ["pacs.parallel=2", "pacs.per_second=100", "pacs.attempts=3", "cpus_per_actor=1"]
    arguments = ["score", tiny_bundle.path, "--images", pacs.address + SEARCH, "--out", tmp_path / "out", *FAST]
    arguments += [word for text in limits for word in ("--set", text)]
    restarting = threading.Thread(target=restart)
    restarting.start()
    code, _, _ = command(*arguments)
    restarting.join()
    assert code == 0
    rows = read_rows(tmp_path / "out")
    assert sorted(row["image_id"] for row in rows) == sorted(f"1.2.{n // 2}.1.{n}" for n in range(30))
    assert [row["image_id"] for row in rows if row["error_code"]] == ["1.2.1.1.3"]
    assert most == 2
    totals = json.loads((tmp_path / "out" / "run.json").read_text())["last_run"]["pacs"]
    assert totals["instances"] == 30
    assert totals["requests"] >= 30 + 3
    assert totals["bytes"] > 30 * 48 * 48
    assert command(*arguments, "--retry-errors")[0] == 0
    assert {row["status"] for row in read_rows(tmp_path / "out")} == {"ok"}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(420)
def test_killed_command_continues_with_its_listing(pacs: DicomwebServer, tiny_bundle: Any, tmp_path: Path) -> None:
    for number in range(6, 60):
        pacs.add(make_instance(number))
    out, log = tmp_path / "out", tmp_path / "log"
    given = ["score", tiny_bundle.path, "--images", pacs.address + SEARCH, "--out", out, *FAST]
    given = [*map(str, given), "--set", "pacs.per_second=8", "--set", "ray.num_cpus=1"]
    process = start_command(given, log)
    wait_until(lambda: count_parts(out, "scores") >= 2 or process.poll() is not None, 200)
    assert process.poll() is None, log.read_text(encoding="utf-8")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept, searches = modification_times(out, "part-*.parquet"), count_searches(pacs)
    assert start_command(given, log).wait(300) == 0, log.read_text(encoding="utf-8")
    rows = read_rows(out)
    assert sorted(row["image_id"] for row in rows) == sorted(f"1.2.{n // 2}.1.{n}" for n in range(60))
    assert {row["status"] for row in rows} == {"ok"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert count_searches(pacs) == searches


@pytest.mark.usefixtures("without_ray")
def test_prepare_takes_a_search(pacs: DicomwebServer, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "prepared"
    arguments = ["prepare", pacs.address + SEARCH, "--out", out, "--size", 32, "--set", "rows_per_shard=4"]
    code, printed, _ = command(*arguments)
    assert code == 0
    assert "1 SR" in printed
    searches, (settings, manifest) = count_searches(pacs), (out / "settings.json", out / "manifest.parquet")
    assert SECRET not in settings.read_text()
    rows = pq.read_table(manifest).to_pylist()
    assert [row["patient_id"] for row in rows] == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert json.loads((out / "32" / "counts.json").read_text()) == {"ok": 6}
    pacs.add(make_instance(7))
    (out / "32" / "part-00001.arrow").unlink()
    assert command(*arguments)[0] == 0
    assert count_searches(pacs) == searches
    assert json.loads((out / "32" / "counts.json").read_text()) == {"ok": 6}
