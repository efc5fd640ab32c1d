"""A small score folder, and browsers that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from review_browser import Browser
from score_archive import Archive

from ray_cxr.review.server import open_review


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """36 images of 12 patients in 24 studies; those of the last patient failed."""
    made = Archive(tmp_path, patients=12)
    made.scores()
    made.labels()
    return made


@pytest.fixture
def open_page(archive: Archive) -> Callable[..., Browser]:
    def open_page(reader: str = "anna", labels: str | None = None, **options: Any) -> Browser:
        return Browser(open_review(archive.root / "SCORES", reader, labels, **options)).log_in()

    return open_page
