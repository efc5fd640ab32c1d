"""Synthetic chests: deterministic, in NIH's dialect, with every finding visible and every breakage real."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_cxr.errors import ImageError, OutputError
from ray_cxr.imaging import phantoms
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.imaging.phantoms import PhantomSet, write_phantoms
from ray_cxr.labels import FINDINGS, NO_FINDING, parse

PATIENTS = 23  # one of every slot, so that every finding occurs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=PATIENTS, size=64)


def _rows(written: PhantomSet) -> list[list[str]]:
    return list(csv.reader(written.table.read_text(encoding="utf-8").splitlines()))[1:]


def _findings(written: PhantomSet) -> dict[str, tuple[str, ...]]:
    return {row[0]: parse(row[1]) for row in _rows(written)}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_depend_on_the_arguments_alone(small: PhantomSet, tmp_path: Path) -> None:
    again = write_phantoms(tmp_path / "again", patients=PATIENTS, size=64)
    old = _files(small.table.parent)
    assert _files(again.table.parent) == old
    assert again.counts == small.counts
    few = write_phantoms(tmp_path / "few", patients=4, size=64, broken=False)
    names = {f"images/{path.name}" for path in few.images.iterdir()}
    assert {item for item in _files(tmp_path / "few").items() if item[0] in names} <= old.items()
    assert few.counts["broken"] == 0
    assert len(names) == len(_rows(few)) == few.counts["images"]
    one, other = (draw_phantom(sample_anatomy(seed, 1, 0, size=64)) for seed in (0, 1))
    assert (one != other).mean() > 0.5


def test_the_table_is_in_nihs_dialect(small: PhantomSet) -> None:
    assert small.table.read_text(encoding="utf-8").splitlines()[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = _rows(small)
    assert {len(row) for row in rows} == {11}
    assert (rows[0][0], rows[0][2:4], rows[0][7:]) == ("00000001_000.png", ["0", "1"], ["64", "64", "5.938", "5.938"])
    assert ({row[5] for row in rows}, {row[6] for row in rows}) == ({"F", "M"}, {"AP", "PA"})
    assert all(18 <= int(row[4]) <= 90 for row in rows)
    assert {token for row in rows for token in row[1].split("|")} == {*FINDINGS, "No Finding"}
    found = _findings(small)
    assert max(len(labels) for labels in found.values()) <= 3
    assert small.counts["No Finding"] == sum(labels == (NO_FINDING,) for labels in found.values())
    for finding in FINDINGS:
        assert small.counts[finding] == sum(finding in labels for labels in found.values()) > 0


def test_the_split_shares_no_patient_and_has_every_row(small: PhantomSet) -> None:
    train_val = small.train_val_list.read_text(encoding="utf-8").split()
    test = small.test_list.read_text(encoding="utf-8").split()
    assert sorted(train_val + test) == sorted(row[0] for row in _rows(small))
    assert {name[:8] for name in train_val}.isdisjoint(name[:8] for name in test)
    assert len({name[:8] for name in test}) == PATIENTS // 4 + len(phantoms.BREAKAGES)
    assert (small.counts["train_val"], small.counts["test"]) == (len(train_val), len(test))


def test_findings_of_the_test_patients_and_of_the_demo() -> None:
    for seed in (0, 7):
        rows = [row for row in phantoms._plan_rows(92, seed, 64) if row.test and row.chest.visit == 0]
        assert {finding for row in rows for finding in row.findings} == set(FINDINGS)
    rows = list(phantoms._plan_rows(400, 0, 256))
    share = {finding: sum(finding in row.findings for row in rows) / len(rows) for finding in FINDINGS}
    assert {finding: value for finding, value in share.items() if not 0.05 < value < 0.13} == {}
    assert 0.33 < sum(not row.findings for row in rows) / len(rows) < 0.45
    visits = [(old, new) for old, new in itertools.pairwise(rows) if old.chest.key == new.chest.key]
    kept = sum(len(set(old.findings) & set(new.findings)) for old, new in visits)
    assert 0.7 < kept / sum(len(old.findings) for old, _ in visits) < 0.9


def test_every_encoding_has_the_drawn_pixels(small: PhantomSet) -> None:
    found = _findings(small)
    modes = {"00000001_000.png": "RGBA", "00000002_000.png": "I;16", "00000003_000.png": "P", "00000004_000.png": "L"}
    for patient, (name, mode) in enumerate(modes.items(), start=1):
        with Image.open(small.images / name) as image:
            assert (image.mode, image.size) == (mode, (64, 64))
        findings = [] if found[name] == (NO_FINDING,) else found[name]
        expected = draw_phantom(sample_anatomy(0, patient, 0, size=64), findings)
        np.testing.assert_array_equal(load_image(str(small.images / name)), expected)


def test_broken_files_are_broken_as_named(small: PhantomSet) -> None:
    codes = ("truncated", "empty", "not_an_image", "missing", "corrupt", "blank")
    found, test = _findings(small), small.test_list.read_text(encoding="utf-8").split()
    assert phantoms.BREAKAGES == ("truncated", "empty", "text", "missing", "bad_crc", "blank")
    for patient, code in enumerate(codes, start=PATIENTS + 1):
        path = small.images / f"{patient:08d}_000.png"
        assert found[path.name] == (NO_FINDING,)
        assert path.name in test
        with pytest.raises(ImageError) as caught:
            load_image(str(path))
        assert caught.value.code == code
    assert small.counts["broken"] == 6


def test_a_complete_set_is_kept_and_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = write_phantoms(out, patients=4, size=64)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    whole = _files(out)
    assert write_phantoms(out, patients=4, size=64) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    settings = json.loads(whole["phantoms.json"])["settings"]
    (out / "phantoms.json").unlink()
    (out / "phantoms.partial.json").write_text(json.dumps(settings), encoding="utf-8")
    first.table.unlink()
    assert write_phantoms(out, patients=4, size=64) == first
    assert _files(out) == whole


def test_other_settings_and_foreign_folders_are_refused(small: PhantomSet, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="other settings"):
        write_phantoms(small.table.parent, patients=5, size=64)
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not phantoms"):
        write_phantoms(tmp_path, patients=4, size=64)
    with pytest.raises(OutputError, match="is a file"):
        write_phantoms(thesis, patients=4, size=64)
    assert list(tmp_path.iterdir()) == [thesis]


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_shows_at_the_size_a_small_model_sees(finding: str) -> None:
    """A finding changes at least 8 of 64 x 64 pixels by far more than the noise (0.6 gray values)."""
    for patient in (1, 3, 5):
        chest = sample_anatomy(0, patient, 0)
        change = draw_phantom(chest, [finding]).astype(float) - draw_phantom(chest)
        assert (np.abs(change.reshape(64, 4, 64, 4).mean(axis=(1, 3))) > 20).sum() >= 8, patient
        if finding not in ("Cardiomegaly", "Emphysema"):
            assert (change == 0).mean() > 0.5
            assert not change[:20].any()


def test_a_normal_chest_has_dark_lungs_and_the_heart_on_the_right() -> None:
    for patient in (1, 4):
        chest = sample_anatomy(0, patient, 0)
        image = draw_phantom(chest).astype(float)
        assert image[120:140, 60:80].mean() + 60 < image[215:235, 60:80].mean()
        middle = 128 + round(256 * chest.shift[0])
        left, right = image[150:165, middle - 40 : middle - 30], image[150:165, middle + 30 : middle + 40]
        assert left.mean() + 30 < right.mean()


def test_visits_differ_and_keep_the_rib_cage() -> None:
    first, second = sample_anatomy(0, 9, 0), sample_anatomy(0, 9, 1)
    assert (first.half_width, first.rib_pitch, first.sex) == (second.half_width, second.rib_pitch, second.sex)
    assert second.age == first.age + 1
    pair = draw_phantom(first, ["Effusion", "Nodule"])
    np.testing.assert_array_equal(pair, draw_phantom(first, ("Nodule", "Effusion")))
    assert (pair.shape, pair.dtype) == ((256, 256), np.uint8)
    assert not np.array_equal(draw_phantom(first), draw_phantom(second))
