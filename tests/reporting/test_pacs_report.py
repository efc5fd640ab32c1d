"""`report` of scores whose images are in a PACS."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicomweb_server import DicomwebServer
from score_archive import without_drawing
from test_nights import write_night

sys.path.insert(0, str(Path(__file__).parents[1] / "imaging"))
from test_dicom import file_of

from ray_cxr.config import PacsSettings
from ray_cxr.storage import dicomweb

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def image() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    return file_of(pixels, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.4", SOPInstanceUID="1.2.3.4.5")


def test_report_shows_images_of_a_pacs_or_says_why_not(image: bytes, tmp_path: Path, command: Command) -> None:
    netrc = tmp_path / "pacs.netrc"
    netrc.write_text("machine 127.0.0.1 login night password secret\n")
    netrc.chmod(0o600)
    with DicomwebServer(login="night:secret") as pacs:
        scores = write_night(tmp_path / "20260301", "2026-03-01", ["a"], np.full((1, 2), 0.1), path=[pacs.add(image)])
        for given in ([], ["--set", f"pacs.credentials={netrc}"]):
            with without_drawing(images=True):
                code, printed, logged = command("report", scores, "--out", tmp_path / "out", *given)
            assert code == 0, logged
            page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
            assert ('alt="Radiograph a"' in page) == bool(given)
            warned = [line for line in printed.splitlines() if "permission" in line and "pacs.credentials" in line]
            assert bool(warned) != bool(given)
            assert "secret" not in printed + logged + page
        following = next(line for line in printed.splitlines() if line.startswith("next: "))
        assert f"pacs.credentials={netrc}" in shlex.split(following)
    dicomweb.configure(PacsSettings())
