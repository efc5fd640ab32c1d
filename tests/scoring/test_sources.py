"""`score` from archives, DICOM folders, and with decoding apart from the network: run the command, read the Parquet."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray


def rows(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted((out / "scores").glob("*.parquet"))], ignore_index=True)


def arguments(bundle, out: Path, *more: object) -> list[object]:
    given = ["score", "--model", bundle.path, "--out", out, "--set", "rows_per_file=8", "--set", "batch_size=8"]
    return [*given, "--max-error-rate", "1", *more]


@pytest.fixture(scope="module")
def pictures(phantoms) -> list[Path]:
    """Twenty pictures of one encoding, and a broken one."""
    found = sorted(path for path in Path(phantoms.images).rglob("*.png") if path.stat().st_size > 3000)[:20]
    broken = next(path for path in Path(phantoms.images).rglob("*") if path.is_file() and path.stat().st_size == 0)
    return [*found, broken]


def write_archive(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_archives_give_the_rows_that_their_files_give(
    ray_here, tiny_bundle, pictures: list[Path], tmp_path: Path, command
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    members = [(path.name, path.read_bytes()) for path in pictures]
    for name, data in members:
        (plain / name).write_bytes(data)
    write_archive(packed / "images_001.tar.gz", [(f"images/{name}", data) for name, data in members[:11]])
    write_archive(packed / "images_002.tar.gz", [(f"images/{name}", data) for name, data in reversed(members[11:])])
    (packed / "readme.txt").write_text("hello")
    for name in ("plain", "packed"):
        code, said, err = command(*arguments(tiny_bundle, tmp_path / f"{name}-out", "--images", tmp_path / name))
        assert code == 0, err
        assert ("files left out, not being images: 1 .txt" in said) == (name == "packed")
    one = rows(tmp_path / "plain-out").set_index("image_id").sort_index()
    two = rows(tmp_path / "packed-out").set_index("image_id").sort_index()
    assert two["path"].str.contains(r"images_00[12]\.tar\.gz::images/").all()
    pd.testing.assert_frame_equal(one.drop(columns="path"), two.drop(columns="path"))
    assert two["error_code"].dropna().tolist() == ["empty"]
    # 11 rows of the first archive make two files, 10 of the second two more: none holds rows of both.
    of_parts = [pd.read_parquet(part) for part in sorted((tmp_path / "packed-out" / "scores").glob("*.parquet"))]
    assert [len(part) for part in of_parts] == [8, 3, 8, 2]

    # One file lost of the second archive; the first archive is gone, and nobody misses it.
    (tmp_path / "packed-out" / "scores" / "part-00003.parquet").unlink()
    (tmp_path / "packed-out" / "_SUCCESS").unlink()
    (packed / "images_001.tar.gz").rename(tmp_path / "away")
    code, said, err = command(*arguments(tiny_bundle, tmp_path / "packed-out", "--images", packed))
    assert code == 0, err
    assert "scored 2 images" in said
    pd.testing.assert_frame_equal(rows(tmp_path / "packed-out").set_index("image_id").sort_index(), two)


def test_what_is_wrong_with_an_archive_is_told_row_by_row(
    ray_here, tiny_bundle, pictures: list[Path], tmp_path: Path, command
) -> None:
    members = [(path.name, path.read_bytes()) for path in pictures[:6]]
    noise = np.random.default_rng(0).bytes(200_000)  # does not compress, so that the cut is in it
    write_archive(tmp_path / "cut.tar.gz", [*members[:3], ("noise.png", noise), *members[3:]])
    whole = (tmp_path / "cut.tar.gz").read_bytes()
    at = whole.index(noise[1000:1032]) if noise[1000:1032] in whole else len(whole) // 2
    (tmp_path / "cut.tar.gz").write_bytes(whole[:at])
    write_archive(tmp_path / "good.tar.gz", members)
    paths = [f"{tmp_path}/cut.tar.gz::{name}" for name, _ in members]
    paths += [f"{tmp_path}/good.tar.gz::{members[0][0]}", f"{tmp_path}/good.tar.gz::none.png"]
    paths += [f"{tmp_path}/gone.tar.gz::a.png", str(tmp_path / "gone.png"), None]
    table = pd.DataFrame({"image_id": [f"{i}.png" for i in range(len(paths))], "path": paths})
    table.to_parquet(tmp_path / "m.parquet")
    code, _, err = command(*arguments(tiny_bundle, tmp_path / "out", "--manifest", tmp_path / "m.parquet"))
    assert code == 0, err
    found = rows(tmp_path / "out").set_index("image_id").loc[table["image_id"]]
    codes = [code if isinstance(code, str) else "ok" for code in found["error_code"]]
    assert codes == ["ok"] * 3 + ["truncated"] * 3 + ["ok"] + ["missing"] * 4
    assert found["error"].dropna().str.len().min() > 5


def test_a_dicom_folder_fills_ids_from_its_headers_and_a_key_hides_them(
    ray_here, tiny_bundle, shared: Path, tmp_path: Path, command
) -> None:
    folder = tmp_path / "dicom"
    for name in ("a", "b"):  # the same file names in two folders, and one without a suffix
        (folder / name).mkdir(parents=True)
    shutil.copy(shared / "dicom" / "nih_00000001_000.dcm", folder / "a" / "1.dcm")
    shutil.copy(shared / "dicom" / "nih_00000002_000.dcm", folder / "b" / "1.dcm")
    shutil.copy(shared / "dicom" / "nih_00000002_000.dcm", folder / "b" / "IM0001")
    (tmp_path / "key").write_text("a secret of more than sixteen bytes")
    (tmp_path / "short").write_text("secret")
    plain, hidden = tmp_path / "plain", tmp_path / "hidden"
    code, _, err = command(*arguments(tiny_bundle, plain, "--images", folder))
    assert code == 0, err
    key = ["--set", f"pseudonym_key={tmp_path / 'key'}"]
    code, _, err = command(*arguments(tiny_bundle, hidden, "--images", folder, *key))
    assert code == 0, err
    one, two = rows(plain).set_index("image_id"), rows(hidden).set_index("image_id")
    assert sorted(one.index) == ["a/1.dcm", "b/1.dcm", "b/IM0001"]
    assert one["patient_id"].notna().all()
    assert (one.loc["a/1.dcm", "sex"], one.loc["a/1.dcm", "view"]) == ("M", "AP")
    assert one.loc["a/1.dcm", "age"] == 58
    assert one.loc["b/1.dcm", "patient_id"] == one.loc["b/IM0001", "patient_id"] != one.loc["a/1.dcm", "patient_id"]
    for column in ("patient_id", "study_id"):
        assert two[column].str.fullmatch("[0-9a-f]{32}").all()
    assert two.loc["b/1.dcm", "patient_id"] == two.loc["b/IM0001", "patient_id"] != two.loc["a/1.dcm", "patient_id"]
    for file in hidden.rglob("*"):
        if file.is_file() and file.suffix != ".parquet":
            assert b"more than sixteen" not in file.read_bytes()
    p = [name for name in one if name.startswith("p_")]
    pd.testing.assert_frame_equal(one[p], two[p])

    code, _, err = command(*arguments(tiny_bundle, hidden, "--images", folder))
    assert (code, err.count("\n")) == (2, 1)
    assert "pseudonyms" in err
    for bad, word in ((tmp_path / "short", "16 or more"), (tmp_path / "none", "No such file")):
        code, _, err = command(
            *arguments(tiny_bundle, tmp_path / "x", "--images", folder, "--set", f"pseudonym_key={bad}")
        )
        assert (code, err.count("\n")) == (2, 1)
        assert word in err


def test_decoding_apart_gives_the_same_rows(ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command) -> None:
    """As with GPUs: decoding in tasks, the network in an actor of its own; and retries go the same way."""
    given = ["--manifest", manifest]
    for name in ("inside", "apart"):
        code, _, err = command(*arguments(tiny_bundle, tmp_path / name, *given, "--set", f"decode={name}"))
        assert code == 0, err
    pd.testing.assert_frame_equal(rows(tmp_path / "inside"), rows(tmp_path / "apart"))
    code, said, err = command(
        *arguments(tiny_bundle, tmp_path / "apart", *given, "--set", "decode=apart", "--retry-errors")
    )
    assert code == 0, err
    assert "scored 1 images" in said
    pd.testing.assert_frame_equal(rows(tmp_path / "inside"), rows(tmp_path / "apart"))


def test_precisions_agree_and_another_one_is_refused(
    ray_here, tiny_bundle, manifest: Path, scores_of, tmp_path: Path, command
) -> None:
    from ray_cxr.models import runtime

    p = [f"p_{name}" for name in tiny_bundle.findings]
    exact = scores_of("fp32")
    keras = tiny_bundle.model()
    from ray_cxr.data import imaging

    good = exact[exact["status"] == "ok"]
    fed = np.stack([imaging.load(path, tiny_bundle.input_spec) for path in good["path"]])
    np.testing.assert_allclose(good[p].to_numpy(), np.asarray(keras(fed[..., None])), rtol=0, atol=1e-5)
    if runtime.cpu_has_bf16():
        half = scores_of("bf16")
        drift = np.abs(half[p].to_numpy() - exact[p].to_numpy())
        assert 0 < np.nanmax(drift) < 0.02
    code, _, err = command(*arguments(tiny_bundle, tmp_path / "fp32", "--manifest", manifest, "--precision", "int8"))
    assert (code, err.count("\n")) == (2, 1)
    assert "quantize" in err
    out = Path(exact.attrs["out"])
    code, _, err = command(
        *arguments(
            tiny_bundle, out, "--manifest", manifest, "--precision", "bf16" if runtime.cpu_has_bf16() else "auto"
        )
    )
    if runtime.cpu_has_bf16():
        assert (code, err.count("\n")) == (2, 1)
        assert "precision fp32 (now bf16)" in err
    assert json.loads((out / "run.json").read_text())["precision"] == "fp32"
    assert len(pq.read_table(out / "scores" / "part-00000.parquet")) == 8


@pytest.fixture
def scores_of(tiny_bundle, manifest: Path, tmp_path: Path, command):
    def run(precision: str) -> pd.DataFrame:
        out = tmp_path / precision
        code, _, err = command(*arguments(tiny_bundle, out, "--manifest", manifest, "--precision", precision))
        assert code == 0, err
        table = rows(out)
        table.attrs["out"] = str(out)
        return table

    return run


def test_a_bundle_that_fails_in_an_actor_is_one_line(
    ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an actor's constructor finds wrong arrives as our own error: here the bundle is gone when it looks."""
    from ray_cxr.scoring import pipeline

    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    run = pipeline._run
    monkeypatch.setattr(pipeline, "_run", lambda *given: (shutil.move(bundle, tmp_path / "moved"), run(*given)))
    given = arguments(tiny_bundle, tmp_path / "out", "--manifest", manifest)
    given[2] = bundle
    code, _, err = command(*given)
    assert code == 2, err
    assert "no such folder" in err
    assert "Traceback" not in err


def test_a_row_read_again_gets_its_own_picture_whatever_became_of_the_file(
    ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    """A killed network actor that had written already is asked again: the file then has other errors than were read."""
    from ray_cxr.config import ScoreSettings
    from ray_cxr.scoring.engine import Job, NetworkActor, decode_task

    table = pd.read_parquet(manifest)
    table = table[table["path"].notna()].head(6).reset_index(drop=True)
    (tmp_path / "p").mkdir()
    good = [row for row, path in enumerate(table["path"]) if Path(path).stat().st_size > 3000]
    for row, path in enumerate(table["path"]):
        table.loc[row, "path"] = str(tmp_path / "p" / f"{row}.png")
        if row not in good[1:4]:
            shutil.copy(path, table.loc[row, "path"])
        else:
            shutil.copy(path, tmp_path / "p" / f"{row}.away")
    table.to_parquet(tmp_path / "m.parquet")
    out = tmp_path / "out"
    code, _, err = command(*arguments(tiny_bundle, out, "--manifest", tmp_path / "m.parquet", "--precision", "fp32"))
    assert code == 0, err
    for row in good[1:3]:  # two of three come back
        (tmp_path / "p" / f"{row}.away").rename(tmp_path / "p" / f"{row}.png")
    job = Job(
        bundle=str(tiny_bundle.path),
        out=str(out),
        digest=tiny_bundle.digest,
        precision="fp32",
        settings=ScoreSettings(rows_per_file=8),
        spec=tiny_bundle.input_spec,
        use_gpu=False,
        batch_size=4,
        key=None,
        settings_file=(out / "settings.json").read_bytes(),
    )
    task = {"indices": [0], "starts": [0], "counts": [len(table)], "retry": True}
    (decoded,) = decode_task(task, job)
    actor = NetworkActor(job, 1)
    p = [f"p_{name}" for name in tiny_bundle.findings]
    for _ in range(2):
        assert actor(decoded)["files"] == 1
        found = rows(out)
        assert found["image_id"].tolist() == table["image_id"].tolist()
        for row in good:
            if row == good[3]:
                assert found.loc[row, "error_code"] == "missing"
            else:
                expected = tiny_bundle.predict([table.loc[row, "path"]], precision="fp32")[p].to_numpy()[0]
                np.testing.assert_allclose(found.loc[row, p].to_numpy(dtype=float), expected, rtol=0, atol=1e-5)


def test_a_file_of_a_run_with_other_settings_is_noticed(
    ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    """A stale worker's file has the right names and the right model; the run that wrote it is told by its metadata."""
    for name, precision in (("one", "fp32"), ("two", "auto")):
        more = ["--set", "max_pixels=90000000"] if name == "two" else []
        given = arguments(tiny_bundle, tmp_path / name, "--manifest", manifest, "--precision", precision, *more)
        assert command(*given)[0] == 0
    shutil.copy(tmp_path / "one/scores/part-00001.parquet", tmp_path / "two/scores/part-00001.parquet")
    code, _, err = command(*given)
    assert (code, err.count("\n")) == (2, 1)
    assert "part-00001.parquet: does not hold the rows it should" in err
