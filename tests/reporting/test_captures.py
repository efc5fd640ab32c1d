"""Heat maps as Secondary Captures: scores, maps and DICOM files in, captures out."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom.uid import SecondaryCaptureImageStorage
from sr_site import IDENTIFYING, NAME, ROOT, Command, Site

from ray_cxr.imaging import overlays
from ray_cxr.reporting import captures


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Six images of three studies with all maps; Cardiomegaly is the only finding with an operating point."""
    site = Site(tmp_path)
    for number in range(6):
        site.add(number, number // 2)
    site.write()
    site.draw_maps()
    return site


def list_flagged(site: Site) -> list[int]:
    return [row for row, flag in enumerate(site.table["flag_Cardiomegaly"].to_pylist()) if flag]


@pytest.mark.slow
def test_every_flagged_finding_has_a_capture_in_its_study(site: Site, command: Command) -> None:
    out, _ = site.run(command, "--heatmaps")
    flagged = list_flagged(site)
    assert 0 < len(flagged) < 6
    assert f"{len(flagged)} flagged findings with a capture" in out
    found = site.captures()
    assert [ds.SourceImageSequence[0].ReferencedSOPInstanceUID for ds in found] == [f"{ROOT}.1.{i}" for i in flagged]
    documents = site.documents()
    for row, ds in zip(flagged, found, strict=True):
        document = documents[str(row // 2)]
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "StudyInstanceUID",
            "AccessionNumber",
            "StudyID",
        ):
            assert ds[keyword] == document[keyword]
        assert ds.SOPClassUID == SecondaryCaptureImageStorage
        assert (ds.Modality, ds.BurnedInAnnotation, ds.ImageType[:2]) == ("OT", "YES", ["DERIVED", "SECONDARY"])
        assert ds.SeriesInstanceUID not in {document.SeriesInstanceUID, f"{ROOT}.3.{row}"}
        assert "RESEARCH ONLY" in ds.SeriesDescription
        assert "RESEARCH ONLY" in ds.DerivationDescription
        probability = site.table["c_Cardiomegaly"][row].as_py()
        assert f"calibrated probability {probability:.2f}" in ds.DerivationDescription
    assert len({ds.SeriesInstanceUID for ds in found}) == len({row // 2 for row in flagged})
    assert not any(word in str(path) for word in IDENTIFYING for path in site.out.rglob("*"))


def test_other_pixels_have_other_uids(site: Site, command: Command) -> None:
    site.run(command, "--heatmaps")
    first = {ds.SOPInstanceUID for ds in site.captures()}
    site.out = site.home / "again"
    site.run(command, "--heatmaps")
    assert {ds.SOPInstanceUID for ds in site.captures()} == first
    site.out = site.home / "larger"
    site.draw_maps(size=(256, 192))
    site.run(command, "--heatmaps")
    assert first.isdisjoint(ds.SOPInstanceUID for ds in site.captures())


def test_captures_show_the_map_below_a_warning(site: Site, command: Command) -> None:
    site.run(command, "--heatmaps")
    for ds in site.captures():
        pixels = ds.pixel_array
        rows, columns = pixels.shape[:2]
        assert columns == 512
        assert rows > 512
        # Coloured text in the first rows, the map's colours in the middle, white text in the last rows.
        yellow = (pixels[..., 0] > 200) & (pixels[..., 2] < 100)
        assert yellow[:40].sum() > 500
        assert not yellow[rows // 3 : rows // 2].any()
        middle = pixels[100:400].astype(int)
        assert (np.abs(middle[..., 0] - middle[..., 2]) > 30).mean() > 0.01
        assert (pixels[-80:].min(axis=2) > 200).sum() > 1000


@pytest.mark.parametrize("shape", [(64, 48), (512, 300), (300, 512), (2048, 1700)])
def test_captions_have_the_same_share_of_every_image(shape: tuple[int, int]) -> None:
    drawn = captures.draw_captions(np.full((*shape, 3), 128, np.uint8), ["Effusion: 0.5", "Model " + "x" * 20])
    scaled = cv2.resize(drawn, (512, 512), interpolation=cv2.INTER_AREA)
    assert (scaled[:60, :, 0] > 150).sum() > 500  # readable at 512 pixels
    gray = (drawn == 128).all(axis=2).sum(axis=1)
    assert gray.max() * max(shape) == pytest.approx(shape[1] * max(drawn.shape[1], 512), rel=0.01)


def read(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "heatmaps").iterdir()}


def test_same_scores_give_the_same_captures(site: Site, command: Command, tmp_path: Path) -> None:
    site.run(command)
    documents = {path.name: path.read_bytes() for path in site.out.glob("*.dcm")}
    site.run(command, "--heatmaps")  # the export without captures was complete
    first = read(site.out)
    assert first
    assert {path.name: path.read_bytes() for path in site.out.glob("*.dcm")} == documents
    site.run(command, "--heatmaps", out=tmp_path / "again")
    assert read(tmp_path / "again") == first


@pytest.mark.long
def test_another_model_has_other_captures(site: Site, command: Command, tmp_path: Path) -> None:
    site.run(command, "--heatmaps")
    site.model[1]["digest"] = "e2" * 32
    site.write()
    site.run(command, "--heatmaps", out=tmp_path / "other")
    assert read(tmp_path / "other")
    assert not read(tmp_path / "other").keys() & read(site.out).keys()


def test_missing_maps_and_overlays_are_counted(site: Site, command: Command) -> None:
    flagged = list_flagged(site)
    site.draw_maps(without=(flagged[0],))
    overlay = site.scores / "heatmaps" / overlays.overlay_name(f"image {flagged[1]}", "Cardiomegaly")
    data = overlay.read_bytes()
    overlay.write_bytes(b"no image")
    out, err = site.run(command, "--heatmaps", code=3)
    assert "1 flagged findings without a heat map" in out
    assert "1 of" in err
    assert NAME not in out + err
    outcomes = pq.read_table(site.out / "heatmaps.parquet")["outcome"].to_pylist()
    assert outcomes == ["no_map", "failed", *["captured"] * (len(flagged) - 2)]
    overlay.write_bytes(data)
    site.run(command, "--heatmaps")
    assert len(site.captures()) == len(flagged) - 1


@pytest.mark.long
def test_captures_of_other_scores_fail_and_are_removed(site: Site, command: Command) -> None:
    site.run(command, "--heatmaps")
    part = site.scores / "heatmaps/part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(3, "p", pa.array([0.25] * table.num_rows, pa.float32())), part)
    site.run(command, "--heatmaps", code=3)
    assert not list((site.out / "heatmaps").glob("*.dcm"))


def test_scores_without_heat_maps_are_refused(tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path)
    site.add(1, 1)
    site.write()
    _, err = site.run(command, "--heatmaps", code=2)
    assert "--heatmaps K" in err
    assert not site.out.exists()
