"""`score --heatmaps K` from outside: run the command, read what it left."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.data import imaging
from ray_cxr.data.heatmaps import SCHEMA, area_of, overlay_name, read_heatmaps
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.models import predictions
from ray_cxr.scoring.engine import Job, Reading
from ray_cxr.scoring.heatmaps import Asked, Drawing

SIDE = 128


def arguments(bundle, source: Path, out: Path, *more: object) -> list[str]:
    kind = "--manifest" if source.suffix == ".parquet" else "--images"
    given = ["score", "--model", str(bundle.path), kind, str(source), "--out", str(out)]
    given += ["--set", "rows_per_file=16", "--set", "batch_size=8", "--set", f"heatmap_pixels={SIDE}"]
    return [*given, *map(str, more)]


def rows(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted((out / "scores").glob("*.parquet"))])


def maps(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted((out / "heatmaps").glob("*.parquet"))])


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- names


@given(st.sets(st.text(min_size=1, max_size=300), min_size=2, max_size=30))
def test_names_are_safe_and_no_two_images_share_one(ids: set[str]) -> None:
    ids |= {"a/b", "a_b", "A", "a", "..", "x.Mass.png", "-rf", "é" * 300}
    names = [overlay_name(image_id, finding) for image_id in sorted(ids) for finding in FINDINGS]
    assert len({name.lower() for name in names}) == len(names)  # as a disk without upper and lower case sees them
    for name in names:
        assert len(name.encode()) < 200
        assert name.isascii()
        assert not set(name) & set("/\\:*?\"<>|\0\n '$`")
        assert not name.startswith((".", "-", "part-00000.parquet"))


def test_names_of_ordinary_ids_are_readable() -> None:
    assert overlay_name("00000001_000.png", "Mass") == "00000001_000.png.Mass.png"
    assert overlay_name("ward 3/IM-1.dcm", "Mass").startswith("ward_3_IM-1_dcm~")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def drawn(ray_here, tiny_bundle, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("drawn") / "out"
    assert main(arguments(tiny_bundle, manifest, out, "--heatmaps", 3)) == 0
    return out


@pytest.mark.ray
def test_each_scored_image_has_the_maps_of_its_highest_ranked_findings(drawn: Path, tiny_bundle) -> None:
    scored, found = rows(drawn).query("status == 'ok'"), maps(drawn)
    assert found["image_id"].drop_duplicates().tolist() == scored["image_id"].tolist()
    assert found["rank"].tolist() == [1, 2, 3] * len(scored)
    assert found.query("rank == 1")["finding"].tolist() == scored["top_finding"].tolist()
    assert NO_FINDING not in set(found["finding"])
    names = list(tiny_bundle.findings)
    thresholds = np.array([np.nan if (t := tiny_bundle.rules.thresholds.get(n)) is None else t for n in names])
    ranks = predictions.ranks(scored[[f"p_{name}" for name in names]].to_numpy(), thresholds)
    for image, group in enumerate(np.split(found["finding"].to_numpy(), len(scored))):
        chosen = ranks[image, [names.index(name) for name in group]]
        assert (np.diff(chosen) <= 0).all()
        assert chosen[-1] >= np.sort(ranks[image])[-3]
    p = scored.set_index("image_id")
    for row in found.itertuples():
        assert row.p == p.loc[row.image_id, f"p_{row.finding}"]


@pytest.mark.ray
def test_maps_are_those_of_the_model_on_the_same_pixels(drawn: Path, tiny_bundle) -> None:
    from ray_cxr.models.explain import GradCam, overlay

    scored = rows(drawn).query("status == 'ok'").set_index("image_id")
    read = read_heatmaps(drawn, image_ids=scored.index[3:7])
    assert len(read) == 12
    cam = GradCam(tiny_bundle.model())
    for (image_id, finding), found in read.items():
        original = imaging.load(scored.loc[image_id, "path"])
        seen = imaging.resize(original, tiny_bundle.input_spec)
        chosen = np.array([[tiny_bundle.findings.index(finding)]])
        (expected,) = cam.maps(seen[None, ..., None], chosen)[0]
        np.testing.assert_allclose(found.cells, expected, rtol=1e-3, atol=1e-6)
        assert found.evidence == pytest.approx(expected.sum(), rel=1e-3, abs=1e-6)
        assert found.picture == original.shape
        shown = np.asarray(Image.open(found.overlay)).astype(int)
        assert shown.shape == (SIDE, SIDE, 3)
        assert np.abs(shown - overlay(original, found.cells, found.area, side=SIDE)).max() <= 1


@pytest.mark.ray
def test_files_are_as_documented_and_in_run_json(drawn: Path) -> None:
    part = pq.read_table(drawn / "heatmaps" / "part-00000.parquet")
    assert part.schema.equals(SCHEMA)
    found = maps(drawn)
    assert {path.name for path in (drawn / "heatmaps").glob("*.png")} == set(found["overlay"])
    run = json.loads((drawn / "run.json").read_text())
    assert run["heatmaps"]["maps"] == len(found) == 3 * run["ok"]
    assert (run["heatmaps"]["count"], run["heatmaps"]["images"]) == (3, run["ok"])
    assert run["heatmaps"]["failed"] == {}
    assert run["heatmaps"]["without_evidence"] == (found["evidence"] == 0).sum()
    assert run["heatmaps"]["last_run"]["images_per_second"] > 0
    assert run["last_run"]["rows_scored"] == run["rows"]
    assert (drawn / "_SUCCESS").exists()


@pytest.mark.ray
def test_scores_are_the_same_bytes_with_and_without(
    drawn: Path, ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    code, _, err = command(*arguments(tiny_bundle, manifest, tmp_path / "plain"))
    assert code == 0, err
    for name in ("settings.json", "model.json", "split.parquet", "input.parquet", "_SUCCESS"):
        assert (tmp_path / "plain" / name).read_bytes() == (drawn / name).read_bytes()
    for part in sorted((drawn / "scores").iterdir()):
        assert (tmp_path / "plain" / "scores" / part.name).read_bytes() == part.read_bytes()
    assert not (tmp_path / "plain" / "heatmaps").exists()
    run = json.loads((tmp_path / "plain" / "run.json").read_text())
    assert not {name for name in (*run, *run["settings"]) if "heatmap" in name}

    # Asked for later, they are added, and what is said of the scoring stays.
    code, said, err = command(*arguments(tiny_bundle, manifest, tmp_path / "plain", "--heatmaps", 3, "--dry-run"))
    assert code == 0, err
    assert f"0 of them to score, heat maps of up to {run['rows']} to draw" in said
    code, said, err = command(*arguments(tiny_bundle, manifest, tmp_path / "plain", "--heatmaps", 3))
    assert code == 0, err
    assert f"heat maps: {3 * run['ok']} for {run['ok']} images" in said
    later = json.loads((tmp_path / "plain" / "run.json").read_text())
    assert {**later, "heatmaps": None} == {**run, "heatmaps": None}
    pd.testing.assert_frame_equal(maps(tmp_path / "plain"), maps(drawn), rtol=1e-4)


@pytest.mark.ray
def test_the_same_command_again_and_one_for_fewer_do_nothing(drawn: Path, tiny_bundle, manifest: Path, command) -> None:
    before = stamps(drawn)
    for count in (3, 1):
        code, said, err = command(*arguments(tiny_bundle, manifest, drawn, "--heatmaps", count))
        assert code == 0, err
        assert "nothing was left to do" in said
    assert stamps(drawn) == before


@pytest.mark.ray
def test_more_maps_are_added_and_another_method_is_refused(
    drawn: Path, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    out = tmp_path / "more"
    shutil.copytree(drawn, out)
    hires = arguments(tiny_bundle, manifest, out, "--heatmaps", 3, "--set", "heatmap_method=hirescam")
    before = stamps(out)
    code, _, err = command(*hires)
    assert (code, err.count("\n")) == (2, 1)
    assert "method gradcam (now hirescam)" in err
    assert stamps(out) == before
    code, _, err = command(*arguments(tiny_bundle, manifest, out, "--heatmaps", 99))
    assert code == 0, err
    found = maps(out)
    assert len(found) == 14 * found["image_id"].nunique()
    assert stamps(out / "scores") == {path: before[path] for path in stamps(out / "scores")}
    pd.testing.assert_frame_equal(
        found.query("rank <= 3").reset_index(drop=True), maps(drawn).reset_index(drop=True), rtol=1e-4
    )


@pytest.mark.ray
def test_what_is_absent_is_drawn_again_and_nothing_else(
    drawn: Path, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    out = tmp_path / "again"
    shutil.copytree(drawn, out)
    (out / "heatmaps" / "part-00001.parquet").unlink()
    (out / "heatmaps" / ".part-00001.parquet.1-ab.part").write_text("half")
    (out / "_SUCCESS").unlink()
    kept = {path: stamp for path, stamp in stamps(out).items() if path.name in ("part-00000.parquet", "input.parquet")}
    code, _, err = command(*arguments(tiny_bundle, manifest, out, "--heatmaps", 3))
    assert code == 0, err
    assert {path: stamps(out)[path] for path in kept} == kept
    assert not list((out / "heatmaps").glob(".*"))
    pd.testing.assert_frame_equal(maps(out), maps(drawn), rtol=1e-4)
    run = json.loads((out / "run.json").read_text())
    assert 0 < run["heatmaps"]["last_run"]["images"] <= 16


@pytest.mark.long
@pytest.mark.ray
def test_pictures_lost_since_are_counted_and_can_be_retried(
    ray_here, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pd.read_parquet(manifest)["path"][:5]:
        shutil.copy(path, folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "broken.png").write_text("no picture")
    out = tmp_path / "out"
    given = arguments(tiny_bundle, folder, out)
    assert command(*given)[0] == 0
    away = folder / names[1]
    away.rename(tmp_path / "away")
    code, said, err = command(*given, "--heatmaps", 2)
    assert code == 0, err
    assert "1 images that were scored could not be drawn: missing 1" in said
    found = maps(out).set_index("image_id")
    assert found.loc[names[1], "error_code"] == "missing"
    assert "broken.png" not in found.index
    assert set(read_heatmaps(out)) == set(found.dropna(subset="finding").set_index("finding", append=True).index)
    assert json.loads((out / "run.json").read_text())["heatmaps"]["failed"] == {"missing": 1}

    (tmp_path / "away").rename(away)
    before = stamps(out)
    assert command(*given, "--heatmaps", 2)[0] == 0  # without being told, what failed is left as it is
    assert stamps(out) == before
    code, said, err = command(*given, "--heatmaps", 2, "--retry-errors")
    assert code == 0, err
    assert "could not be drawn" not in said
    assert maps(out)["image_id"].value_counts().to_dict() == dict.fromkeys(names, 2)

    # Scored anew, drawn anew; and --fresh leaves what others put there.
    (out / "heatmaps" / "notes.png").write_text("mine")
    away.unlink()
    code, _, err = command(*given, "--fresh", "--limit", 4)
    assert code == 0, err
    assert [path.name for path in (out / "heatmaps").iterdir()] == ["notes.png"]
    code, _, err = command(*given, "--heatmaps", 1, "--limit", 4)
    assert code == 0, err
    assert maps(out)["image_id"].tolist() == [n for n in sorted([*names, "broken.png"]) if n != names[1]][:4]


@pytest.mark.ray
def test_a_picture_that_is_not_the_one_that_was_scored_gets_no_map(drawn: Path, tiny_bundle, tmp_path: Path) -> None:
    """Its row says another probability than its pixels give now; without Ray, the worker's own parts alone."""
    out = tmp_path / "out"
    shutil.copytree(drawn, out)
    part = out / "scores" / "part-00000.parquet"
    table = pq.read_table(part)
    p = table["p_Mass"].to_numpy().copy()
    p[2] = p[2] + 0.4 if p[2] < 0.5 else p[2] - 0.4
    place = table.column_names.index("p_Mass")
    pq.write_table(table.set_column(place, table.schema.field("p_Mass"), pa.array(p, from_pandas=True)), part)
    job = Job(
        bundle=str(tiny_bundle.path),
        out=str(out),
        digest=tiny_bundle.digest,
        precision="fp32",
        settings=ScoreSettings(),
        spec=tiny_bundle.input_spec,
        use_gpu=False,
        batch_size=8,
        key=None,
        settings_file=(out / "settings.json").read_bytes(),
    )
    drawing = Drawing(job, Asked(2, "gradcam", 64), 1)
    works = drawing.take_up([0])
    (images,) = drawing.draw(works, Reading(job, 1, drawing.more).pictures(works))
    found = pd.read_parquet(out / "heatmaps" / "part-00000.parquet").set_index("image_id")
    assert found["error_code"].dropna().to_dict() == {table["image_id"][2].as_py(): "changed"}
    assert len(found) == 2 * images + 1
    # Of the third map, drawn before, nothing is left.
    listed = {
        name for path in (out / "heatmaps").glob("*.parquet") for name in pd.read_parquet(path)["overlay"].dropna()
    }
    assert {path.name for path in (out / "heatmaps").glob("*.png")} == listed


@pytest.mark.ray
def test_archives_oblong_pictures_and_foreign_names(
    ray_here, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded network, pictures in an archive and beside it, ids that are no file names."""
    from conftest import make_tiny_bundle

    with monkeypatch.context() as patch:
        patch.setattr("ray_cxr.config.InputSpec", functools.partial(InputSpec, aspect="pad"))
        bundle = make_tiny_bundle(tmp_path / "bundle", findings=("Mass", NO_FINDING))
    assert bundle.input_spec.aspect == "pad"
    noise = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, shape in (("a.png", (60, 120)), ("b.png", (200, 50)), ("c.png", (90, 90))):
        Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "in" / name)
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "in" / "a.png", "x/a.png")
        tar.add(tmp_path / "in" / "b.png", "x/b.png")
    archive = tmp_path / "in.tar.gz"
    ids = ["../../a b.png", "../../a_b.png", "Ärzte/ÄB"]
    paths = [f"{archive}::x/b.png", f"{archive}::x/a.png", str(tmp_path / "in" / "c.png")]
    pq.write_table(pa.table({"image_id": ids, "path": paths}), tmp_path / "m.parquet")
    code, _, err = command(*arguments(bundle, tmp_path / "m.parquet", tmp_path / "out", "--heatmaps", 5))
    assert code == 0, err
    found = read_heatmaps(tmp_path / "out")
    assert set(found) == {(image_id, "Mass") for image_id in ids}
    assert [found[image_id, "Mass"].picture for image_id in ids] == [(200, 50), (60, 120), (90, 90)]
    sizes = [Image.open(found[image_id, "Mass"].overlay).size for image_id in ids]
    assert sizes == [(32, 128), (128, 64), (128, 128)]
    assert {one.overlay.parent for one in found.values()} == {tmp_path / "out" / "heatmaps"}
    for one in found.values():
        assert one.area == area_of(bundle.input_spec, *one.picture)
        assert one.on_picture().shape == one.picture


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(420)
def test_a_run_killed_while_it_draws_continues(tiny_bundle, tmp_path: Path) -> None:
    """A real process, a real SIGKILL; what was drawn is not drawn again, and every image ends with its map."""
    noise = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(noise.integers(0, 256, (300, 300), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    ids = [f"{row:05d}" for row in range(320)]
    paths = [str(tmp_path / f"{row % 4}.png") for row in range(320)]
    pq.write_table(pa.table({"image_id": ids, "path": paths}), tmp_path / "m.parquet")
    out, log = tmp_path / "out", tmp_path / "log"
    program = [sys.executable, "-m", "ray_cxr.cli"]
    program += arguments(tiny_bundle, tmp_path / "m.parquet", out, "--heatmaps", 2)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(log, "ab") as stream:
        process = subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)
        deadline = time.monotonic() + 180
        while len(list((out / "heatmaps").glob("part-*.parquet"))) < 2:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "_SUCCESS").exists()
        time.sleep(2)  # what Ray left behind ends by itself
        kept = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
        assert len([path for path in kept if path.parent.name == "heatmaps"]) < 20
        assert subprocess.run(program, stdout=stream, stderr=stream, env=environment, timeout=200).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = maps(out)
    assert found["image_id"].tolist() == [name for name in ids for _ in range(2)]
    assert {path.name for path in (out / "heatmaps").iterdir()} == {
        *found["overlay"],
        *(f"part-{part:05d}.parquet" for part in range(20)),
    }


# ---------------------------------------------------------------- refusals


def test_no_maps_are_refused_in_one_line(tmp_path: Path, manifest: Path, tiny_bundle, command) -> None:
    from conftest import make_tiny_bundle

    code, _, err = command(*arguments(tiny_bundle, manifest, tmp_path / "out", "--heatmaps", 0))
    assert (code, err.count("\n")) == (2, 1)
    assert "give at least 1" in err
    nothing = make_tiny_bundle(tmp_path / "bundle", findings=(NO_FINDING,))
    code, _, err = command(*arguments(nothing, manifest, tmp_path / "out", "--heatmaps", 1))
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_reading_what_is_not_there_or_damaged_says_so(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no heat maps"):
        read_heatmaps(tmp_path)
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / "part-00000.parquet").write_text("x")
    with pytest.raises(TableError, match=r"part-00000\.parquet"):
        read_heatmaps(tmp_path)


def test_every_label_can_stand_in_a_name() -> None:
    assert all("." not in name and "~" not in name for name in LABELS)
