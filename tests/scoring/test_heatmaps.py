"""`score --heatmaps K` from outside: run the command, read what it left. Mostly without Ray."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_bundle, replace_ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from score_folders import (
    arguments,
    assert_done,
    assert_refused,
    make_job,
    modification_times,
    read_maps,
    read_rows,
    write_archive,
)

from ray_cxr import telemetry
from ray_cxr.cli import main
from ray_cxr.config import InputSpec
from ray_cxr.data.partition import Range
from ray_cxr.errors import TableError
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.overlays import SCHEMA, compute_area, draw_overlay, overlay_name, read_heatmaps
from ray_cxr.imaging.resize import resize
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.scoring.heatmaps import HeatMapActor, HeatMapRequest, count_maps, remove_maps
from ray_cxr.scoring.pool import show_files
from ray_cxr.scoring.ranges import ProgressFile, ScoreTask

SIDE = 128  # as in `arguments`
ALL = ("--set", "heatmap_images=all")


@given(st.sets(st.text(min_size=1, max_size=300), min_size=2, max_size=30))
def test_overlay_names_are_safe_and_unique(ids: set[str]) -> None:
    ids |= {"a/b", "a_b", "A", "a", "..", "x.Mass.png", "-rf", "é" * 300}
    names = [overlay_name(image_id, finding) for image_id in sorted(ids) for finding in FINDINGS]
    assert len({name.lower() for name in names}) == len(names)  # also where the disk ignores case
    for name in names:
        assert len(name.encode()) < 200
        assert name.isascii()
        assert not set(name) & set("/\\:*?\"<>|\0\n '$`")
        assert not name.startswith((".", "-", "part-00000.parquet"))
    assert overlay_name("00000001_000.png", "Mass") == "00000001_000.png.Mass.jpg"
    assert overlay_name("ward 3/IM-1.dcm", "Mass").startswith("ward_3_IM-1_dcm~")


@pytest.fixture(scope="module")
def with_maps(scores: Path, tiny_bundle, manifest: Path, tmp_path_factory) -> Path:
    """The fixture `scores` with three maps per image, drawn later."""
    out = tmp_path_factory.mktemp("maps") / "out"
    shutil.copytree(scores, out)
    with replace_ray():
        assert main(arguments(tiny_bundle, manifest, out, "--heatmaps", 3)) == 0
    return out


@pytest.fixture
def copy(with_maps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(with_maps, tmp_path / "copy")


@pytest.mark.slow
def test_maps_are_of_the_highest_ranked_and_of_the_flagged_findings(with_maps: Path, tiny_bundle) -> None:
    scored, found = read_rows(with_maps).query("status == 'ok'"), read_maps(with_maps)
    assert found["image_id"].drop_duplicates().tolist() == scored["image_id"].tolist()
    assert found.query("rank == 1")["finding"].tolist() == scored["top_finding"].tolist()
    assert NO_FINDING not in set(found["finding"])
    names = tiny_bundle.rules.ranked.names
    further = 0
    for (_, row), (_, maps) in zip(scored.iterrows(), found.groupby("image_id", sort=False), strict=True):
        c = [row[f"c_{name}"] for name in maps["finding"][:3]]
        assert c == sorted((row[f"c_{name}"] for name in names), reverse=True)[:3]
        assert maps["rank"].tolist() == sorted(maps["rank"])
        assert maps["rank"].tolist()[:3] == [1, 2, 3]
        flagged = {name for name in tiny_bundle.findings if row[f"flag_{name}"]}
        assert set(maps["finding"][3:]) == flagged - set(maps["finding"][:3])
        further += len(maps) - 3
    assert further
    p = scored.set_index("image_id")
    assert found["p"].tolist() == [p.loc[row.image_id, f"p_{row.finding}"] for row in found.itertuples()]


@pytest.mark.slow
def test_maps_are_those_of_the_model_on_the_same_pixels(with_maps: Path, tiny_bundle) -> None:
    from ray_cxr.models.explain import GradCam

    scored = read_rows(with_maps).query("status == 'ok'").set_index("image_id")
    read = read_heatmaps(with_maps, image_ids=scored.index[3:7])
    assert len(read) >= 12
    originals = [load_image(scored.loc[image_id, "path"]) for image_id, _ in read]
    seen = np.stack([resize(original, tiny_bundle.input_spec) for original in originals])[..., None]
    chosen = np.array([[tiny_bundle.findings.index(finding)] for _, finding in read])
    expected = GradCam(tiny_bundle.model()).explain(seen, chosen).maps[:, 0]
    for found, cells, original in zip(read.values(), expected, originals, strict=True):
        np.testing.assert_allclose(found.cells, cells, rtol=1e-3, atol=1e-5)
        assert found.evidence == pytest.approx(cells.sum(), rel=1e-3, abs=1e-4)
        assert found.image_shape == original.shape
        is_flagged = scored.loc[found.image_id, f"flag_{found.finding}"]
        assert (found.overlay is not None) == bool(is_flagged and found.evidence)
        if found.overlay is not None:
            shown = np.asarray(Image.open(found.overlay)).astype(int)
            assert np.abs(shown - draw_overlay(original, found.cells, found.area, side=SIDE)).mean() < 4
    assert {heatmap.overlay is None for heatmap in read.values()} == {False, True}


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_drawing_adds_its_own_files_and_changes_no_other(with_maps, scores, tiny_bundle, manifest, command) -> None:
    for path in {path.relative_to(scores) for path in modification_times(scores)} - {Path("run.json")}:
        assert (with_maps / path).read_bytes() == (scores / path).read_bytes()
    found = read_maps(with_maps)
    assert pq.read_table(with_maps / "heatmaps" / "part-00000.parquet").schema.equals(SCHEMA)
    assert {path.name for path in (with_maps / "heatmaps").glob("*.jpg")} == set(found["overlay"].dropna())
    old, new = (json.loads((out / "run.json").read_text(encoding="utf-8")) for out in (scores, with_maps))
    maps = new.pop("heatmaps")
    assert {**new, "settings": None} == {**old, "settings": None}
    assert maps["maps"] == len(found)
    assert (maps["count"], maps["images"], maps["failed"]) == (3, new["ok"], {})
    assert 0 < maps["drawn"] == found["overlay"].notna().sum() < len(found)
    rows = read_rows(with_maps).query("status == 'ok'")
    flagged = rows[[f"flag_{name}" for name in FINDINGS if name in tiny_bundle.findings]].eq(True).sum().sum()
    by_id = rows.set_index("image_id")
    with_map = sum(bool(by_id.loc[row.image_id, f"flag_{row.finding}"]) for row in found.itertuples())
    assert (maps["flagged"], with_map, maps["flagged_without_map"]) == (flagged, flagged, 0)
    assert maps["without_evidence"] == (found["evidence"] == 0).sum()

    # The same command leaves finished maps alone.
    before = modification_times(with_maps)
    for count in (3, 1):
        again = arguments(tiny_bundle, manifest, with_maps, "--heatmaps", count)
        assert "already" in assert_done(command(*again))
    other_method = arguments(tiny_bundle, manifest, with_maps, "--heatmaps", 3, "--set", "heatmap_method=hirescam")
    assert_refused(command(*other_method), "method gradcam (now hirescam)")
    assert modification_times(with_maps) == before


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("count", [3, 5])
def test_missing_or_additional_maps_are_drawn(
    copy, with_maps, tiny_bundle, manifest, command, count: int, monkeypatch
) -> None:
    """With the same count only the missing file is drawn; more maps are added to those that are there."""
    measured: list[tuple[str, float]] = []
    monkeypatch.setattr(telemetry, "add_inference", lambda *measurement: measured.append(measurement))
    given = arguments(tiny_bundle, manifest, copy, "--heatmaps", count)
    if count == 3:
        (copy / "heatmaps" / "part-00001.parquet").unlink()
        (copy / "heatmaps" / ".part-00001.parquet.1-ab.part").write_text("half")
        (copy / "_SUCCESS").unlink()
        assert "0 of them to score, heat maps of up to 16 to draw" in command(*given, "--dry-run")[1]
    kept = modification_times(copy / "scores")
    if count == 3:
        kept |= modification_times(copy, "input.parquet") | modification_times(copy / "heatmaps", "part-00000.parquet")
    assert_done(command(*given))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list((copy / "heatmaps").glob(".*"))
    found = read_maps(copy)
    assert (found["rank"] <= count).sum() == count * found["image_id"].nunique()
    first, expected = (maps.query("rank <= 3").reset_index(drop=True) for maps in (found, read_maps(with_maps)))
    pd.testing.assert_frame_equal(first, expected, rtol=1e-3, atol=1e-5)
    images = json.loads((copy / "run.json").read_text(encoding="utf-8"))["heatmaps"]["last_run"]["images"]
    assert 0 < images <= (16 if count == 3 else found["image_id"].nunique())
    assert len(measured) >= images / 8
    assert all(name == "heatmaps" and seconds > 0 for name, seconds in measured)


@pytest.mark.ray
def test_ray_writes_the_rows_and_maps_of_one_process(
    shared_ray, scores: Path, with_maps: Path, tiny_bundle, manifest: Path, tmp_path: Path, command
) -> None:
    """The other tests in this folder rely on this: their stand-in for Ray Data gives what two actors of Ray give."""
    out = tmp_path / "out"
    assert_done(command(*arguments(tiny_bundle, manifest, out, "--heatmaps", 3, "--set", "decode=inside")))
    assert (out / "settings.json").read_bytes() == (scores / "settings.json").read_bytes()
    pd.testing.assert_frame_equal(read_rows(out), read_rows(scores), rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(read_maps(out), read_maps(with_maps), rtol=1e-3, atol=1e-5)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run["actors"], run["cpus_per_actor"]) == (2, 1)
    assert run["heatmaps"]["last_run"]["images"] == run["ok"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_lost_images_are_counted_and_can_be_retried(tiny_bundle, manifest: Path, tmp_path: Path, command) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for path in pd.read_parquet(manifest)["path"][:3]:
        shutil.copy(path, folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "broken.png").write_text("no image")
    given = arguments(tiny_bundle, folder, out)
    assert_done(command(*given))
    away = (folder / names[1]).rename(tmp_path / "away")
    assert "1 images that were scored could not be drawn: missing 1" in assert_done(command(*given, "--heatmaps", 1))
    found = read_maps(out).set_index("image_id")
    assert found["error_code"].dropna().to_dict() == {names[1]: "missing"}
    assert "broken.png" not in found.index
    assert set(read_heatmaps(out)) == set(found.dropna(subset="finding").set_index("finding", append=True).index)

    away.rename(folder / names[1])
    before = modification_times(out)
    assert_done(command(*given, "--heatmaps", 1))  # failures are left as they are without --retry-errors
    assert modification_times(out) == before
    assert "could not be drawn" not in assert_done(command(*given, "--heatmaps", 1, "--retry-errors"))
    assert sorted(read_maps(out).query("rank == 1")["image_id"]) == sorted(names)

    # --fresh removes the maps of the earlier run and leaves the user's own files.
    (out / "heatmaps" / "notes.png").write_text("mine")
    assert_done(command(*given, "--fresh", "--limit", 3))
    assert [path.name for path in (out / "heatmaps").iterdir()] == ["notes.png"]
    (out / "heatmaps" / "notes.png").unlink()
    remove_maps(out)
    assert not (out / "heatmaps").exists(), "a report takes the folder as a sign of heat maps"


@pytest.mark.slow
def test_image_that_changed_since_scoring_gets_no_map(copy: Path, tiny_bundle, monkeypatch) -> None:
    """The row of the third image has another probability than its pixels give now."""
    part = copy / "scores" / "part-00000.parquet"
    table = pq.read_table(part)
    p = table["p_Mass"].to_numpy().copy()
    p[2] += 0.4 if p[2] < 0.5 else -0.4
    index, field = table.column_names.index("p_Mass"), table.schema.field("p_Mass")
    pq.write_table(table.set_column(index, field, pa.array(p, from_pandas=True)), part)
    counts: list[int] = []
    monkeypatch.setattr(ProgressFile, "write", lambda self, count: counts.append(count))
    actor = HeatMapActor(make_job(tiny_bundle, copy), HeatMapRequest(2, "gradcam", SIDE), 1)
    images = actor(ScoreTask((Range(0, 0, len(table)),), retry=False).to_row())["images"]
    found = pd.read_parquet(copy / "heatmaps" / "part-00000.parquet").set_index("image_id")
    assert found["error_code"].dropna().to_dict() == {table["image_id"][2].as_py(): "changed"}
    assert (found["rank"] <= 2).sum() == 2 * images
    assert counts == sorted(counts)
    assert (len(counts), counts[-1]) == (2, len(table)), "the driver learns of every batch"
    # The overlays of the third map, drawn before, are removed.
    assert {path.name for path in (copy / "heatmaps").glob("*.jpg")} == set(read_maps(copy)["overlay"].dropna())


@pytest.mark.slow
def test_maps_without_evidence_are_not_drawn(copy: Path, tiny_bundle, monkeypatch) -> None:
    part, rows = (
        copy / "heatmaps" / "part-00000.parquet",
        pq.read_table(copy / "scores" / "part-00000.parquet").num_rows,
    )
    drawn = pd.read_parquet(part)["overlay"].notna()
    actor = HeatMapActor(make_job(tiny_bundle, copy), HeatMapRequest(3, "gradcam", SIDE), 1)
    explain = actor.cam.explain
    monkeypatch.setattr(actor.cam, "explain", lambda *given: (0 * explain(*given)[0], explain(*given)[1]))
    part.unlink()
    actor(ScoreTask((Range(0, 0, rows),), retry=False).to_row())
    assert pd.read_parquet(part)["overlay"].isna().all()
    # Earlier versions drew them.
    table = pq.read_table(part)
    names = pa.array([name if name else None for name in np.where(drawn, "1.Mass.jpg", "")])
    pq.write_table(table.set_column(table.column_names.index("overlay"), "overlay", names), part)
    found = count_maps(copy, [Range(0, 0, rows)], tiny_bundle)
    assert (found.overlays, found.without_evidence) == (0, len(table))


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_maps_of_oblong_images_in_archives_with_foreign_ids(tmp_path: Path, command, monkeypatch) -> None:
    """A model that pads its input; images in an archive and next to it; ids that are no file names."""
    with monkeypatch.context() as patch:
        patch.setattr("ray_cxr.config.InputSpec", functools.partial(InputSpec, aspect="pad"))
        bundle = make_tiny_bundle(tmp_path / "bundle", findings=("Mass", NO_FINDING))
    assert bundle.input_spec.aspect == "pad"
    noise = np.random.default_rng(0)
    shapes = {"a.png": (60, 120), "b.png": (200, 50), "c.png": (90, 90)}
    for name, shape in shapes.items():
        Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    archive = tmp_path / "in.tar.gz"
    write_archive(archive, [(f"x/{name}", (tmp_path / name).read_bytes()) for name in ("a.png", "b.png")])
    ids = ["../../a b.png", "../../a_b.png", "Ärzte/ÄB"]
    paths = [f"{archive}::x/b.png", f"{archive}::x/a.png", str(tmp_path / "c.png")]
    pq.write_table(pa.table({"image_id": ids, "path": paths}), tmp_path / "m.parquet")
    assert_done(command(*arguments(bundle, tmp_path / "m.parquet", tmp_path / "out", "--heatmaps", 5, *ALL)))
    found = read_heatmaps(tmp_path / "out")
    assert set(found) == {(image_id, "Mass") for image_id in ids}
    maps = [found[image_id, "Mass"] for image_id in ids]
    assert [heatmap.image_shape for heatmap in maps] == [shapes[name] for name in ("b.png", "a.png", "c.png")]
    assert [Image.open(heatmap.overlay).size for heatmap in maps] == [(32, 128), (128, 64), (128, 128)]
    for heatmap in maps:
        assert heatmap.overlay.parent == tmp_path / "out" / "heatmaps"
        assert heatmap.area == compute_area(bundle.input_spec, *heatmap.image_shape)
        assert heatmap.project().shape == heatmap.image_shape


def test_runs_and_folders_without_maps_are_refused(tmp_path: Path, manifest: Path, tiny_bundle, command) -> None:
    out = tmp_path / "out"
    assert_refused(command(*arguments(tiny_bundle, manifest, out, "--heatmaps", 0)), "--heatmaps 0", "at least 1")
    healthy = make_tiny_bundle(tmp_path / "bundle", findings=(NO_FINDING,))
    assert_refused(command(*arguments(healthy, manifest, out, "--heatmaps", 1)), NO_FINDING)
    assert not out.exists()

    with pytest.raises(TableError, match="no heat maps"):
        read_heatmaps(tmp_path)
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / "part-00000.parquet").write_text("x")
    with pytest.raises(TableError, match=r"part-00000\.parquet"):
        read_heatmaps(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_maps_of_a_bundle_without_layers_are_drawn_by_occlusion(manifest: Path, tmp_path: Path, command) -> None:
    onnx = Path(__file__).parents[1] / "models/small.onnx"
    given = ["import-weights", str(onnx), "--input-layout", "nchw", "--normalization", "imagenet", "--logits"]
    assert_done(command(*given, "--findings", "Mass,Edema,Hernia", "--out", str(tmp_path / "graph")))
    out = tmp_path / "out"
    score = arguments(tmp_path / "graph", manifest, out, "--limit", 4, "--heatmaps", 2)
    assert_refused(command(*score), "heatmap_method=occlusion")
    assert_done(command(*score, "--set", "heatmap_method=occlusion"))
    maps, rows = read_maps(out), read_rows(out)
    drawn = maps[maps["error_code"].isna()]
    assert len(drawn) == 2 * (rows["status"] == "ok").sum() > 0
    assert set(zip(drawn["height"], drawn["width"], strict=True)) == {(7, 7)}
    assert all((out / "heatmaps" / name).exists() for name in drawn["overlay"].dropna())
    # A graph has no operating points, so each image shows its top finding.
    assert drawn["overlay"].notna().tolist() == (drawn["rank"] == 1).tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_setting_selects_the_maps_that_are_drawn_over_the_image(copy, tiny_bundle, manifest, command) -> None:
    folder = copy / "heatmaps"
    flagged = set(read_maps(copy)["overlay"].dropna())
    given = arguments(tiny_bundle, manifest, copy, "--heatmaps", 3)
    assert "already" in assert_done(command(*given, "--set", "heatmap_images=none"))
    assert_done(command(*given, *ALL))
    maps = read_maps(copy)
    assert {path.name for path in folder.glob("*.jpg")} == set(maps["overlay"].dropna()) > flagged
    assert maps["overlay"].notna().equals(maps["evidence"] > 0)
    before = modification_times(copy)
    assert "already" in assert_done(command(*given))
    assert modification_times(copy) == before

    # A run with `all` was killed while it drew a range, and continues with `none`.
    (folder / "part-00001.parquet").unlink()
    (folder / "mine.jpg").touch()
    assert_done(command(*given, "--set", "heatmap_images=none"))
    left = set(read_maps(copy)["overlay"].dropna())
    assert {path.name for path in folder.glob("*.jpg")} == left | {"mine.jpg"}
    assert 0 < len(left) < len(maps)


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_maps_of_an_earlier_version_stay_and_are_completed(copy, tiny_bundle, manifest, command) -> None:
    """Earlier versions drew every map, as PNG, and did not record which maps are drawn."""
    folder = copy / "heatmaps"
    for part in folder.glob("part-*.parquet"):
        table = pq.read_table(part)
        state = json.loads(table.schema.metadata[b"ray_cxr.heatmaps"])
        del state["overlays"]
        names = [f"{i}-{part.stem}.Mass.png" for i in range(len(table))]
        for name in names:
            Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / name)
        table = table.set_column(table.column_names.index("overlay"), "overlay", pa.array(names))
        pq.write_table(table.replace_schema_metadata({b"ray_cxr.heatmaps": json.dumps(state)}), part)
    for path in folder.glob("*.jpg"):
        path.unlink()
    given = arguments(tiny_bundle, manifest, copy, "--heatmaps", 3)
    before = modification_times(copy)
    assert "already" in assert_done(command(*given, *ALL))
    assert modification_times(copy) == before
    (folder / "part-00000.parquet").unlink()
    assert_done(command(*given))
    overlays = [heatmap.overlay for heatmap in read_heatmaps(copy).values() if heatmap.overlay is not None]
    assert {path.suffix for path in overlays} == {".jpg", ".png"}
    assert {Path(path) for path in folder.glob("*.*g")} == set(overlays)

    # With more maps per image, all of them are drawn over it, because those of the earlier version were.
    said = assert_done(command(*arguments(tiny_bundle, manifest, copy, "--heatmaps", 4)))
    assert "already" not in said
    maps = read_maps(copy).dropna(subset="finding")
    assert (maps["rank"] == 4).sum() == maps["image_id"].nunique()
    assert maps["overlay"].notna().all()
    assert {path.name for path in folder.glob("*.*g")} == set(maps["overlay"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_flagged_findings_that_an_earlier_version_left_out_are_counted(copy, tiny_bundle, manifest, command) -> None:
    for part in (copy / "heatmaps").glob("part-*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.filter(pc.less_equal(table["rank"], 3)), part)
    left = read_maps(copy)
    said = assert_done(command(*arguments(tiny_bundle, manifest, copy, "--heatmaps", 3)))
    assert "earlier version" in said
    assert read_maps(copy).equals(left)
    shutil.rmtree(copy / "heatmaps")
    assert "earlier version" not in assert_done(command(*arguments(tiny_bundle, manifest, copy, "--heatmaps", 3)))
    assert len(read_maps(copy)) > len(left)


def test_progress_counts_images_of_unfinished_files(tmp_path: Path, capsys) -> None:
    ranges = [Range(0, 0, 16), Range(1, 16, 16)]
    with show_files("heat maps", tmp_path, ranges, set(), lambda file: 0):
        ProgressFile(tmp_path / "part-00001.parquet").write(5)
    assert "heat maps: 5 of 32 images" in capsys.readouterr().err
    with show_files("heat maps", tmp_path, ranges, set(), lambda file: 0):
        (tmp_path / "part-00000.parquet").touch()
        ProgressFile(tmp_path / "part-00000.parquet").write(16)
    assert "heat maps: 16 of 32 images" in capsys.readouterr().err, "a file counts once, and not what a killed run left"
