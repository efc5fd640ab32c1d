"""What identifies an image in the scores: SOP Instance UID and SHA-256 of the file. Without Ray."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from score_folders import arguments, assert_done, read_rows, write_archive

sys.path.insert(0, str(Path(__file__).parents[1] / "imaging"))
from test_dicom import file_of

from ray_cxr.imaging.sandbox import Decoder, Failure

pytestmark = pytest.mark.slow


def make_dicom(**fields: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    return file_of(pixels, **{"PatientID": "Doe", "StudyInstanceUID": "1.2.3", "SOPInstanceUID": "1.2.3.4", **fields})


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("decode", ["inside", pytest.param("apart", marks=pytest.mark.long)])
def test_rows_have_uid_and_digest_which_a_key_hides(tiny_bundle, phantoms, tmp_path, command, decode: str) -> None:
    images, key, plain, hidden = (tmp_path / name for name in ("images", "key", "plain", "hidden"))
    images.mkdir()
    key.write_text("a secret of more than sixteen bytes")
    png = next(path for path in sorted(Path(phantoms.images).rglob("*.png")) if path.stat().st_size > 3000)
    contents = {"a.dcm": make_dicom(), "ct.dcm": make_dicom(Modality="CT"), "b.png": png.read_bytes(), "c.png": b"no"}
    for name, data in contents.items():
        (images / name).write_bytes(data)
    write_archive(images / "d.tar.gz", [("d.png", contents["b.png"])])
    (images / "gone.png").symlink_to(tmp_path / "none")
    more = ["--set", f"decode={decode}", "--max-error-rate", "1"]
    assert_done(command(*arguments(tiny_bundle, images, plain, *more)))
    assert_done(command(*arguments(tiny_bundle, images, hidden, *more, "--set", f"pseudonym_key={key}")))
    found, other = (read_rows(out).set_index("image_id") for out in (plain, hidden))
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    expected["d.png"] = expected["b.png"]
    assert found["content_digest"].dropna().to_dict() == expected, "also of files that cannot be decoded"
    assert found["sop_instance_uid"].dropna().to_dict() == {"a.dcm": "1.2.3.4", "ct.dcm": "1.2.3.4"}
    assert other.loc["b.png", "content_digest"] == other.loc["d.png", "content_digest"]
    marks = [*other["sop_instance_uid"].dropna(), *other["content_digest"].dropna()]
    assert (len(marks), {len(mark) for mark in marks}) == (7, {32})
    assert not {*expected.values(), "1.2.3.4"} & set(marks)


@pytest.mark.long
@pytest.mark.usefixtures("without_ray")
def test_retry_in_a_file_of_an_earlier_version(tiny_bundle, manifest: Path, scores: Path, tmp_path, command) -> None:
    """Files of scores without the new columns get them for the rows that are scored again."""
    out = shutil.copytree(scores, tmp_path / "out")
    part = out / "scores" / "part-00000.parquet"
    for path in out.glob("scores/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["sop_instance_uid", "content_digest"]), path)
    gone = read_rows(out).query("error_code == 'missing'")["image_id"].tolist()
    assert gone
    assert_done(command(*arguments(tiny_bundle, manifest, out, "--retry-errors")))
    assert set(pd.read_parquet(part)["model_digest"].dropna()) == {tiny_bundle.digest}
    assert read_rows(out)["image_id"].tolist() == read_rows(scores)["image_id"].tolist()


def test_identify_reads_the_header_alone(tmp_path: Path) -> None:
    data = make_dicom(ViewPosition="PA", ImageComments="x" * 100_000)
    (tmp_path / "a.dcm").write_bytes(data)
    (tmp_path / "b.dcm").write_bytes(data[:50_000])  # ends in its header
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n and more")
    with Decoder([], tags=True) as decoder:
        tags = decoder.identify(str(tmp_path / "a.dcm"), header=True, digest=False)
        assert not isinstance(tags, Failure)
        assert (tags["sop_instance_uid"], tags["view"], tags["study_id"]) == ("1.2.3.4", "PA", "1.2.3")
        assert "content_digest" not in tags
        both = decoder.identify(data, header=True, digest=True)
        assert both == {**tags, "content_digest": hashlib.sha256(data).hexdigest()}
        cut = decoder.load(str(tmp_path / "b.dcm"))
        assert isinstance(cut, Failure)
        assert decoder.identify(str(tmp_path / "b.dcm"), header=True, digest=False) == cut.tags, "as in the scores"
        assert decoder.identify(str(tmp_path / "c.png"), header=True, digest=False) == {}
        gone = decoder.identify(str(tmp_path / "none"), header=True, digest=True)
        assert isinstance(gone, Failure)
        assert gone.code == "missing"
