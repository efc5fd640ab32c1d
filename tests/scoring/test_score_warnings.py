"""`score` warns of findings that cannot be flagged before it starts; of most images flagged, and of training images, at
its end.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import score_arguments

from ray_cxr.cli import main
from ray_cxr.evaluation import usability


@pytest.mark.slow
def test_warnings_of_model_and_flags(
    tiny_bundle, manifest: Path, scores: Path, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(scores, tmp_path / "scores"))
    for flagged, warned in ((True, True), (False, False)):
        for part in (out / "scores").glob("*.parquet"):
            table = pq.read_table(part)
            for name in table.column_names:
                if name.startswith("flag_"):
                    values = [flagged and name == "flag_Nodule"] * len(table)
                    index = table.column_names.index(name)
                    table = table.set_column(index, table.schema.field(name), pa.array(values, pa.bool_()))
            pq.write_table(table, part)
        with caplog.at_level(logging.WARNING, "ray_cxr"):
            assert main(score_arguments(tiny_bundle.path, manifest, out)) == 0
        printed = capsys.readouterr().out
        assert ("images (100.0%) are flagged, almost all for Nodule" in printed) == warned
        without = sum(not point for point in tiny_bundle.info["operating_points"].values())
        assert f"{without} of 14 findings cannot be flagged" in caplog.text
    assert "used to train" not in printed
    first = pq.read_table(out / "scores" / "part-00000.parquet").slice(0, 1)
    used = pq.read_table(out / "split.parquet")
    trained = {"image_id": first["image_id"], "patient_id": pa.nulls(1, pa.string()), "split": ["train"]}
    pq.write_table(pa.table(trained, used.schema.remove_metadata()), out / "split.parquet")
    assert main(score_arguments(tiny_bundle.path, manifest, out)) == 0
    assert "1 of " in (printed := capsys.readouterr().out)
    assert "was used to train or tune this model" in printed
    dry_run = [*score_arguments(tiny_bundle.path, manifest, out), "--dry-run"]
    assert main(dry_run) == 0
    (warning,) = usability.warn_of_model(tiny_bundle.info)
    for text in (capsys.readouterr().out, caplog.text):
        assert warning.text in text
        assert warning.advice in text
