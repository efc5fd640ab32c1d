"""A real PACS: nights are screened from Orthanc, and documents are stored in it. `scripts/services pacs` installs it.

The tests of this file share one server and run in order: the first night, its documents, the second night.
"""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orthanc
import pandas as pd
import pydicom
import pytest
from conftest import make_tiny_bundle
from nodes import wait_until
from orthanc import Disturber, Orthanc
from pacs_images import SECRET, Instance, make_documents, make_night
from pydicom import uid

from ray_cxr.cli import main
from ray_cxr.config import PacsSettings
from ray_cxr.storage.dicomweb import configure, get_text, search

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not orthanc.is_installed(), reason="Orthanc is not installed; run scripts/services pacs as root"
    ),
]
FIRST, SECOND = "20260105", "20260106"


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc.run_orthanc(tmp_path_factory.mktemp("pacs")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(pacs: Orthanc) -> Iterator[Disturber]:
    """Refuse one request in six with 503, and break one answer in nine, during the first night; later fewer."""
    with Disturber(pacs.port, every=6, broken_every=9) as disturber:
        yield disturber


@pytest.fixture(scope="module")
def images(pacs: Orthanc) -> list[Instance]:
    """Store the first night, with an SR and a Secondary Capture of another maker, and return its radiographs."""
    made = make_night(FIRST, 200)
    assert set(pacs.upload(one.data for one in [*made, *make_documents(FIRST)])) == {"Success"}
    return made


@pytest.fixture(scope="module")
def login(pacs: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options that give a command the credentials and quick retries."""
    path = pacs.write_credentials(tmp_path_factory.mktemp("login") / "netrc")
    return ["--set", f"pacs.credentials={path}", "--set", "pacs.per_second=40"]


class Night(NamedTuple):
    """The folder of a night's scores, and what its commands wrote."""

    out: Path
    output: str


@pytest.fixture(scope="module")
def night(
    shared_ray: None,
    pacs: Orthanc,
    proxy: Disturber,
    images: list[Instance],
    login: list[str],
    bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Night:
    """Score the first night, during which the server is stopped and started."""
    out = tmp_path_factory.mktemp("nights") / FIRST
    restarts: list[int] = []

    def restart() -> None:
        wait_until(lambda: count_fetches(proxy) > 60, 200)
        pacs.stop()
        time.sleep(1.0)
        pacs.start()
        restarts.append(count_fetches(proxy))

    with pytest.MonkeyPatch.context() as patch:
        restarting = threading.Thread(target=restart)
        restarting.start()
        code, output = run(patch, score(bundle, address(proxy), out, *login))
        restarting.join()
        assert restarts, "the server was not restarted"
        assert restarts[0] < count_fetches(proxy), "it was restarted after the night"
        assert code == 0, output
        # Scores what was not available in all attempts.
        code, again = run(patch, score(bundle, address(proxy), out, *login, "--retry-errors"))
        assert code == 0, again
    return Night(out, output + again)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("model") / "bundle").path


def address(server: Orthanc | Disturber, query: str = f"StudyDate={FIRST}-{SECOND}&ModalitiesInStudy=DX") -> str:
    return f"dicomweb+{server.root}?{query}"


def score(bundle: Path, source: str | Path, out: Path, *more: object) -> list[str]:
    given = ["score", "--model", bundle, "--images", source, "--out", out, "--precision", "fp32", *more]
    return [str(item) for item in (*given, "--set", "rows_per_file=16")]


def run(patch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code, and what it wrote to stdout and stderr."""
    output = io.StringIO()
    patch.setattr("sys.stdout", output)
    patch.setattr("sys.stderr", output)
    try:
        return main(arguments), output.getvalue()
    finally:
        patch.undo()


def count_fetches(proxy: Disturber) -> int:
    return sum("/instances/" in path for path in list(proxy.paths))


def read_rows(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "scores").set_index("image_id")


def test_each_instance_has_one_row_although_the_server_restarted(
    night: Night, proxy: Disturber, images: list[Instance]
) -> None:
    rows = read_rows(night.out)
    assert sorted(rows.index) == sorted(one.uid for one in images)
    (broken,) = (one.uid for one in images if one.kind == "broken")
    assert rows["error_code"].dropna().to_dict() == {broken: "truncated"}
    assert proxy.refused > 20
    assert proxy.broken > 10
    assert proxy.most_at_once <= 4  # the default of pacs.parallel


@pytest.mark.parametrize("page", [3, 50, 500])
def test_pages_of_a_search_for_modalities_lose_no_study(
    pacs: Orthanc, images: list[Instance], login: list[str], page: int
) -> None:
    """Orthanc 1.10 applies the limit before the offset if a key is not in its index."""
    file = login[1].partition("=")[2]
    configure(PacsSettings(credentials=file, page=page, per_second=1000))
    gaps: Counter[str] = Counter()
    rows = list(search(address(pacs), gaps))
    assert {one.uid for one in images} <= {get_text(row, "00080018") for row in rows}
    assert not gaps
    configure(PacsSettings())


def test_the_listing_fills_the_columns_of_patients_and_studies(
    night: Night, proxy: Disturber, images: list[Instance]
) -> None:
    rows = read_rows(night.out)
    for one in images:
        row = rows.loc[one.uid]
        assert row["path"] == f"dicomweb+{proxy.root}/{one.path}"
        assert (row["patient_id"], row["study_id"]) == (one.patient, one.study)
        assert (row["age"], row["sex"]) == (one.age, one.sex)
        assert row["view"] == ("LATERAL" if one.kind == "lateral" else one.view)
    flags = {one.kind: rows.loc[one.uid, "quality_flag"] for one in images if one.kind in ("lateral", "knee")}
    assert flags == {"lateral": "lateral", "knee": "not_frontal_chest"}


def test_scores_equal_those_of_the_same_files_on_disk(
    night: Night, images: list[Instance], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for one in images:
        (folder / f"{one.uid}.dcm").write_bytes(one.data)
    code, output = run(monkeypatch, score(bundle, folder, tmp_path / "out"))
    assert code == 0, output
    expected = read_rows(tmp_path / "out")
    expected.index = expected.index.str.removesuffix(".dcm")
    found = read_rows(night.out).loc[expected.index]
    values = [table.filter(regex="^p_").to_numpy() for table in (found, expected)]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    assert found["quality_flag"].equals(expected["quality_flag"])


def test_no_output_holds_a_name_a_password_or_a_query(night: Night) -> None:
    content = night.output.encode() + b"".join(path.read_bytes() for path in night.out.rglob("*") if path.is_file())
    assert night.output
    for secret in (SECRET, orthanc.PASSWORD):
        assert secret.encode() not in content


class Sent(NamedTuple):
    """What the server holds: UIDs before documents were sent, afterwards, and after each way of sending them again."""

    out: Path
    before: set[str]
    stored: set[str]
    again: dict[str, set[str]]


@pytest.fixture(scope="module")
def sent(night: Night, pacs: Orthanc, proxy: Disturber, login: list[str], bundle: Path) -> Sent:
    """Draw heat maps of images in the PACS, and send the documents of the first night: once, and again in four ways."""
    before, out = set(pacs.list_uids()), night.out.parent / "documents"
    to_pacs, to_scp = f"dicomweb+{proxy.root}", f"dimse://{pacs.aet}@127.0.0.1:{pacs.dicom_port}"

    def send(folder: Path, *more: str) -> set[str]:
        with pytest.MonkeyPatch.context() as patch:
            given = ["export-sr", str(night.out), "--out", str(folder), "--heatmaps", *more, *login]
            code, output = run(patch, given)
            assert code == 0, output
        return set(pacs.list_uids())

    proxy.every, proxy.broken_every = 25, 40
    with pytest.MonkeyPatch.context() as patch:
        code, output = run(patch, score(bundle, address(proxy), night.out, *login, "--heatmaps", "1"))
        assert code == 0, output
    stored = send(out, "--send", to_pacs)
    again = {
        "the same command": send(out, "--send", to_pacs),
        "--resend": send(out, "--send", to_pacs, "--resend"),
        "C-STORE": send(out, "--send", to_scp),
        "a new folder": send(out.with_name("documents2"), "--send", to_pacs),
    }
    return Sent(out, before, stored, again)


def test_documents_are_stored_in_the_studies_of_their_images(
    sent: Sent, pacs: Orthanc, images: list[Instance], night: Night
) -> None:
    studies = {one.uid: one.study for one in images}
    rows = read_rows(night.out)
    files = pacs.retrieve(sent.stored - sent.before)
    new = [pydicom.dcmread(io.BytesIO(data)) for data in files.values()]
    reports = [one for one in new if one.Modality == "SR"]
    captures = [one for one in new if one.Modality != "SR"]
    # One report per study with a scored image: the damaged image shares its study with another one.
    assert sorted(one.StudyInstanceUID for one in reports) == sorted(set(studies.values()))
    assert len(captures) > 20
    for one in captures:
        assert one.SOPClassUID == uid.SecondaryCaptureImageStorage
        (source,) = (item.ReferencedSOPInstanceUID for item in one.SourceImageSequence)
        assert studies[source] == one.StudyInstanceUID
        assert rows.loc[source, "status"] == "ok"
        assert one.pixel_array.shape[:2] == (one.Rows, one.Columns)
    for one in new:
        assert one.PatientName == SECRET  # from the header of the image: the PACS files the document under it


def test_documents_come_back_byte_for_byte(sent: Sent, pacs: Orthanc) -> None:
    files = {path.stem: path.read_bytes() for path in sent.out.rglob("*.dcm")}
    assert pacs.retrieve(sent.stored - sent.before) == files


def test_sending_again_makes_no_duplicates(sent: Sent) -> None:
    assert sent.again == dict.fromkeys(sent.again, sent.stored)


def test_the_second_night_scores_only_new_images(
    sent: Sent, night: Night, pacs: Orthanc, proxy: Disturber, login: list[str], bundle: Path, monkeypatch: Any
) -> None:
    """The search finds both nights, with the documents of the first."""
    new = make_night(SECOND, 20, first=200)
    assert set(pacs.upload(one.data for one in new)) == {"Success"}
    out = night.out.with_name(SECOND)
    more = ("--skip-scored", str(night.out), *login)
    code, output = run(monkeypatch, score(bundle, address(proxy), out, *more))
    assert code == 0, output
    rows = read_rows(out)
    assert sorted(rows.index) == sorted(one.uid for one in new)
    assert set(rows["status"]) == {"ok"}
