"""`score --features`: the pooled features of each image, one file per range, and the nearest images. Without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from score_folders import arguments, assert_done, modification_times, read_rows

from ray_cxr.data import features
from ray_cxr.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("without_ray")


def read_parts(out: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(part).to_pandas() for part in sorted((out / "features").glob("*.parquet"))])


@pytest.mark.slow
def test_features_are_those_of_the_model(tiny_bundle, manifest, scores, tmp_path: Path, command) -> None:
    out = tmp_path / "out"
    given = arguments(tiny_bundle, manifest, out, "--features")
    assert_done(command(*given))
    rows, found = read_rows(out), read_parts(out)
    pd.testing.assert_frame_equal(rows, read_rows(scores), check_exact=True)
    assert found["image_id"].tolist() == rows["image_id"].tolist()
    assert found["features"].isna().tolist() == (rows["status"] == "error").tolist()
    assert [path.name for path in sorted((out / "features").iterdir())] == [
        path.name for path in sorted((out / "scores").iterdir())
    ]
    loaded = features.load_features(out)
    assert loaded.vectors.dtype == np.float16
    assert loaded.model_digest == tiny_bundle.digest
    kernel, bias = tiny_bundle.model().get_layer("logits").get_weights()
    logits = loaded.vectors.astype(np.float64) @ kernel + bias
    p = rows.loc[rows["status"] == "ok", [f"p_{name}" for name in tiny_bundle.findings]].to_numpy(np.float64)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), p, atol=2e-3)

    # Nothing is repeated; a lost file of features, or a run of other settings, is noticed.
    before = modification_times(out)
    assert "already complete" in assert_done(command(*given))
    assert modification_times(out) == before
    assert "already complete" in assert_done(command(*arguments(tiny_bundle, manifest, out)))
    (out / "features/part-00001.parquet").unlink()
    assert "scored 16 images" in assert_done(command(*given))
    pd.testing.assert_frame_equal(read_parts(out), found, check_exact=True)
    assert_done(command(*given[:-1], "--fresh"))
    assert not list((out / "features").iterdir())


@pytest.mark.slow
def test_retry_replaces_features_of_its_rows_alone(tiny_bundle, manifest, tmp_path: Path, command) -> None:
    table = pd.read_parquet(manifest)
    table = table[table["path"].notna()].head(6).reset_index(drop=True)
    hidden = tmp_path / "later.png"
    source = table.loc[2, "path"]
    table.loc[2, "path"] = str(hidden)
    table.to_parquet(tmp_path / "m.parquet")
    given = arguments(tiny_bundle, tmp_path / "m.parquet", tmp_path / "out", "--features")
    assert_done(command(*given))
    before = read_parts(tmp_path / "out")
    assert before["features"].isna().tolist()[2]
    hidden.write_bytes(Path(source).read_bytes())
    assert_done(command(*given, "--retry-errors"))
    after = read_parts(tmp_path / "out")
    assert after["features"].notna()[2]
    for row in {0, 1, 3, 4, 5} & set(np.flatnonzero(before["features"].notna())):
        np.testing.assert_array_equal(after["features"].iloc[row], before["features"].iloc[row])


def test_nearest_images_by_cosine() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9000, 8)).astype(np.float16)
    known = features.Features([f"{i}.png" for i in range(9000)], values, "digest")
    wide = values.astype(np.float64)
    cosine = wide @ wide[7] / np.linalg.norm(wide, axis=1) / np.linalg.norm(wide[7])
    order = [i for i in np.argsort(-cosine) if i != 7][:5]
    found = known.find_nearest("7.png", 5)
    assert found["image_id"].tolist() == [f"{i}.png" for i in order]
    np.testing.assert_allclose(found["similarity"], cosine[order], atol=1e-5)
    assert known.find_nearest(values[7], 1)["image_id"].tolist() == ["7.png"]
    assert len(features.Features(["a"], values[:1], "d").find_nearest("a")) == 0
    for query in ("none.png", np.zeros(3), np.full(8, np.nan)):
        with pytest.raises(InputError):
            known.find_nearest(query)


def test_folders_without_features_are_refused(scores, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--features"):
        features.load_features(scores)
    with pytest.raises(ConfigError, match="score folder"):
        features.load_features(tmp_path)
    with pytest.raises(ConfigError, match="float16"):
        features.write_features(tmp_path / "x", None, np.full((1, 2), 1e6), np.zeros(1, bool), {})
