"""The images with a quality flag on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_cxr.reporting import worklist_page
from ray_cxr.reporting.scores import Scores
from ray_cxr.reporting.worklist_page import StudyRow

#: Images on the page.
_MOST = 10


def list_quality_images(table: Scores, named: Mapping[str, Sequence[str]]) -> list[StudyRow]:
    """Return the images that a report names for a quality flag, at most 10, with radiographs.

    Args:
        named: the ids of images by quality flag.
    """
    chosen = [(image_id, flag) for flag, ids in named.items() for image_id in ids][:_MOST]
    if not chosen:
        return []
    places = {image_id: row for row, image_id in enumerate(table.ids.tolist())}
    rows = [places[image_id] for image_id, _ in chosen]
    lines = [{"image_id": image_id, "quality_flags": flag} for image_id, flag in chosen]
    studies = [StudyRow(line, None, None, [], 0) for line in lines]
    return worklist_page.add_images(studies, table, rows, None)
