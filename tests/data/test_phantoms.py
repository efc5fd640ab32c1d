"""Synthetic chests: deterministic, in NIH's dialect, with every finding drawn and every breakage real."""

from __future__ import annotations

import csv
import io
import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_cxr.data import phantoms
from ray_cxr.data.phantoms import anatomy, draw, write_phantoms
from ray_cxr.errors import ConfigError, OutputError
from ray_cxr.labels import FINDINGS, NO_FINDING, parse

PATIENTS = 46  # twice all slots: every finding is the first of two patients


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> phantoms.PhantomSet:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=PATIENTS, size=64)


def _rows(written: phantoms.PhantomSet) -> list[list[str]]:
    return list(csv.reader(io.StringIO(written.table.read_text(encoding="utf-8"))))[1:]


def _findings(written: phantoms.PhantomSet) -> dict[str, tuple[str, ...]]:
    return {row[0]: parse(row[1]) for row in _rows(written)}


def _gray(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


# ---- the set ----------------------------------------------------------------------------------------------


def test_two_calls_write_the_same_bytes(small, tmp_path):
    again = write_phantoms(tmp_path / "again", patients=PATIENTS, size=64)
    old, new = small.table.parent, again.table.parent
    names = sorted(path.relative_to(old) for path in old.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    assert [name for name in names if (old / name).read_bytes() != (new / name).read_bytes()] == []
    assert again.counts == small.counts


def test_more_patients_leave_the_first_ones_as_they_are(small, tmp_path):
    few = write_phantoms(tmp_path / "few", patients=8, size=64, broken=False)
    names = [path.name for path in few.images.iterdir()]
    assert names
    assert all((few.images / n).read_bytes() == (small.images / n).read_bytes() for n in names)


def test_another_seed_draws_other_patients():
    assert (draw(anatomy(0, 1, 0, size=64)) != draw(anatomy(1, 1, 0, size=64))).mean() > 0.5


def test_header_is_nih_s_and_rows_have_its_eleven_columns(small):
    text = small.table.read_text(encoding="utf-8")
    assert text.splitlines()[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = _rows(small)
    assert {len(row) for row in rows} == {11}
    assert rows[0][0] == "00000001_000.png"
    assert rows[0][2:4] == ["0", "1"]
    assert {row[5] for row in rows} == {"F", "M"}
    assert {row[6] for row in rows} == {"AP", "PA"}
    assert all(18 <= int(row[4]) <= 90 for row in rows)
    assert rows[0][7:] == ["64", "64", "5.938", "5.938"]


def test_labels_are_spelled_as_nih_does_and_parse(small):
    tokens = {token for row in _rows(small) for token in row[1].split("|")}
    assert tokens == {*FINDINGS, "No Finding"}
    found = _findings(small)
    assert max(len(labels) for labels in found.values()) <= 3
    assert small.counts["No Finding"] == sum(labels == (NO_FINDING,) for labels in found.values())
    for finding in FINDINGS:
        assert small.counts[finding] == sum(finding in labels for labels in found.values()) > 0


def test_lists_share_no_patient_and_together_name_all_rows(small):
    train_val = small.train_val_list.read_text().split()
    test = small.test_list.read_text().split()
    assert sorted(train_val + test) == sorted(row[0] for row in _rows(small))
    assert {name[:8] for name in train_val}.isdisjoint(name[:8] for name in test)
    assert len({name[:8] for name in test}) == PATIENTS // 4 + len(phantoms.BREAKAGES)
    assert (small.counts["train_val"], small.counts["test"]) == (len(train_val), len(test))


def test_each_finding_is_the_first_of_a_test_patient_in_every_92():
    for seed in (0, 7):
        rows = [row for row in phantoms._rows(92, seed, 64) if row.test and row.chest.visit == 0]
        assert {finding for row in rows for finding in row.findings} == set(FINDINGS)


def test_prevalence_and_persistence_at_the_demo_s_size():
    rows = list(phantoms._rows(400, 0, 256))
    share = {finding: sum(finding in row.findings for row in rows) / len(rows) for finding in FINDINGS}
    assert {finding: value for finding, value in share.items() if not 0.05 < value < 0.13} == {}
    assert 0.33 < sum(not row.findings for row in rows) / len(rows) < 0.45
    pairs = [
        (set(old.findings), set(new.findings))
        for old, new in itertools.pairwise(rows)
        if old.chest.key == new.chest.key
    ]
    kept = sum(len(old & new) for old, new in pairs) / sum(len(old) for old, _ in pairs)
    assert 0.7 < kept < 0.9
    assert max(row.chest.visit for row in rows) == 4


# ---- files ------------------------------------------------------------------------------------------------


def test_other_encodings_hold_the_same_drawing(small):
    found = _findings(small)
    for patient, mode in ((1, "RGBA"), (2, "I;16"), (3, "P")):
        path = small.images / f"{patient:08d}_000.png"
        findings = [] if found[path.name] == (NO_FINDING,) else found[path.name]
        with Image.open(path) as image:
            assert image.mode == mode
            if mode == "I;16":
                values = np.asarray(image).astype(np.int64)
                assert (values % 257 == 0).all()
                gray = (values // 257).astype(np.uint8)
            else:
                gray = np.asarray(image.convert("L"))
        assert np.array_equal(gray, draw(anatomy(0, patient, 0, size=64), findings))


def test_all_other_images_are_square_eight_bit_gray(small):
    for row in _rows(small):
        if 3 < int(row[3]) <= PATIENTS:
            with Image.open(small.images / row[0]) as image:
                assert (image.mode, image.size) == ("L", (64, 64))


def test_broken_files_are_broken_as_named(small):
    kinds = dict(enumerate(phantoms.BREAKAGES, start=PATIENTS + 1))
    found, test = _findings(small), small.test_list.read_text().split()
    paths = {kind: small.images / f"{patient:08d}_000.png" for patient, kind in kinds.items()}
    assert all(found[path.name] == (NO_FINDING,) and path.name in test for path in paths.values())
    assert small.counts["broken"] == 6

    assert not paths["missing"].exists()
    assert paths["empty"].read_bytes() == b""
    assert paths["text"].read_bytes().decode("ascii").isprintable() is False  # it ends in a newline
    assert not paths["text"].read_bytes().startswith(b"\x89PNG")
    truncated = paths["truncated"].read_bytes()
    assert truncated.startswith(b"\x89PNG")
    assert b"IEND" not in truncated
    with pytest.raises(OSError, match="truncated"):
        _gray(paths["truncated"])
    assert _crcs_hold(paths["bad_crc"].read_bytes()) == [True, False, True]
    assert len(np.unique(_gray(paths["blank"]))) == 1


def _crcs_hold(data: bytes) -> list[bool]:
    """Of every chunk, whether its checksum is right (PNG, clause 5.3)."""
    result, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body, crc = data[at + 4 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        result.append(zlib.crc32(body) == struct.unpack(">I", crc)[0])
        at += 12 + length
    return result


def test_no_broken_files_unless_asked(tmp_path):
    whole = write_phantoms(tmp_path / "whole", patients=4, size=64, broken=False)
    assert whole.counts["broken"] == 0
    assert len(list(whole.images.iterdir())) == len(_rows(whole)) == whole.counts["images"]
    assert all(len(np.unique(_gray(path))) > 100 for path in whole.images.iterdir() if "2_000" not in path.name)


def test_a_complete_set_is_left_alone_and_an_interrupted_one_is_finished(tmp_path):
    out = tmp_path / "set"
    first = write_phantoms(out, patients=4, size=64)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_phantoms(out, patients=4, size=64) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps

    table = first.table.read_bytes()
    settings = json.loads((out / "phantoms.json").read_text())["settings"]
    (out / "phantoms.json").unlink()
    (out / "phantoms.partial.json").write_text(json.dumps(settings))
    first.table.unlink()
    assert write_phantoms(out, patients=4, size=64) == first
    assert first.table.read_bytes() == table
    assert (out / "phantoms.json").exists()
    assert not (out / "phantoms.partial.json").exists()


def test_other_settings_or_other_things_in_the_folder_are_refused(tmp_path):
    write_phantoms(tmp_path / "set", patients=4, size=64)
    with pytest.raises(OutputError, match="other settings"):
        write_phantoms(tmp_path / "set", patients=5, size=64)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="no phantoms; name a new or an empty folder"):
        write_phantoms(tmp_path / "mine", patients=4, size=64)
    with pytest.raises(OutputError, match="is a file"):
        write_phantoms(tmp_path / "mine" / "thesis.txt", patients=4, size=64)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("bad", [{"patients": 3}, {"size": 32}, {"seed": -1}])
def test_settings_out_of_range_are_refused(bad, tmp_path):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: "):
        write_phantoms(tmp_path / "set", **bad)
    assert not (tmp_path / "set").exists()


# ---- the drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_shows_at_the_size_a_small_network_sees(finding):
    """Shrunk to 64 x 64, a finding moves a patch of pixels by far more than the noise (0.6 gray values)."""
    for patient in range(1, 7):
        chest = anatomy(0, patient, 0)
        change = np.abs(_shrink(draw(chest, [finding])) - _shrink(draw(chest)))
        assert (change > 20).sum() >= 8, patient


@pytest.mark.parametrize("finding", sorted(set(FINDINGS) - {"Cardiomegaly", "Emphysema"}))
def test_a_finding_leaves_the_rest_of_the_picture_alone(finding):
    chest = anatomy(0, 3, 0)
    same = draw(chest, [finding]) == draw(chest)
    assert same.mean() > 0.5
    assert same[:20].all()


def _shrink(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(64, 4, 64, 4).mean(axis=(1, 3))


def test_findings_in_any_order_give_one_picture():
    chest = anatomy(0, 5, 1)
    pair = draw(chest, ["Effusion", "Nodule"])
    assert np.array_equal(pair, draw(chest, ("Nodule", "Effusion")))
    assert (pair.shape, pair.dtype) == ((256, 256), np.uint8)


def test_a_normal_chest_looks_like_one():
    """Lungs dark, heart and abdomen bright, the heart to the right of the picture."""
    for patient in range(1, 13):
        chest = anatomy(0, patient, 0)
        picture = draw(chest).astype(float)
        lung = picture[120:140, 60:80].mean()
        assert lung + 60 < picture[215:235, 60:80].mean()
        assert lung + 60 < picture[140:160, 122:134].mean()
        middle = 128 + round(256 * chest.shift[0])
        left, right = picture[150:165, middle + 30 : middle + 40], picture[150:165, middle - 40 : middle - 30]
        assert left.mean() > right.mean() + 30


def test_a_patient_s_visits_differ_and_the_rib_cage_stays():
    first, second = anatomy(0, 9, 0), anatomy(0, 9, 1)
    assert (first.half_width, first.rib_pitch, first.sex) == (second.half_width, second.rib_pitch, second.sex)
    assert second.age == first.age + 1
    assert not np.array_equal(draw(first), draw(second))


def test_unknown_findings_and_patients_are_refused():
    with pytest.raises(ValueError, match="not a finding: 'Infiltrate'"):
        draw(anatomy(0, 1, 0, size=64), ["Infiltrate"])
    with pytest.raises(ValueError, match="patient 0"):
        anatomy(0, 0, 0)
