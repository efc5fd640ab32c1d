"""A report on one image of one patient: every part is written, in the singular, and without comparisons."""

from __future__ import annotations

import re
from pathlib import Path

from score_archive import Archive, report


def test_report_on_one_image(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", findings=("Mass",))
    row = int(archive.tested.nonzero()[0][0])
    labels = archive.labels(keep=[row], sex=["F"] * archive.n, view=["AP"] * archive.n)
    panel, out = tmp_path / "panel.csv", tmp_path / "out"
    panel.write_text(f"image_id,Mass\n{archive.ids[row]},1\n", encoding="utf-8")
    found = report(archive, out, labels=labels, split="test", consensus=str(panel))
    assert (found.metrics["n_images"], found.metrics["n_patients"]) == (1, 1)
    for name in ("report.html", "report.md", "checklist.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert not re.findall(r".{20}\b1 (?:\w+ )?(?:images|patients|findings|studies|cases|groups|rows)\b", text)
        assert "0 of 0" not in text
    assert found.metrics["subgroups"]["comparisons"]["single"]["made"] == 0
