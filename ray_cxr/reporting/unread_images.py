"""Why the page lacks radiographs of its worklist, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ray_cxr.reporting.worklist_page import CARDS, StudyRow
from ray_cxr.storage.paths import is_dicomweb

_REMEDIES = {
    "permission": "pass how to reach the PACS, as for `score`: --set pacs.credentials=FILE",
    "storage": "repeat the command when the PACS answers",
    "missing": "the PACS has deleted them",
}
_FILE_REMEDIES = {
    "missing": "repeat the command in the folder in which `score` ran",
    "permission": "repeat the command as a user who can read them",
}


def explain_unread_images(rows: Sequence[StudyRow], paths: np.ndarray) -> str:
    """Return a sentence on images of the first rows that were scored and could not be read; nothing without any.

    Args:
        paths: of all images of the report, object array of str or None.
    """
    cards = rows[:CARDS]
    lost = Counter(row.image_error for row in cards if row.image_error and row.priority is not None)
    if not lost:
        return ""
    remedies = _REMEDIES if any(path is not None and is_dicomweb(path) for path in paths) else _FILE_REMEDIES
    codes = ", ".join(f"{code} {n}" for code, n in lost.items())
    remedy = "; ".join(remedies[code] for code in lost if code in remedies)
    text = f"{lost.total()} of {len(cards)} radiographs were scored, but cannot be read: {codes}"
    return f"{text}. Remedy: {remedy}." if remedy else f"{text}."


def describe_missing_images(rows: Sequence[StudyRow], paths: np.ndarray) -> str:
    """Return `explain_unread_images`, or that the table has no paths; nothing if no radiograph is missing."""
    cards = rows[:CARDS]
    has_image = any(row.image or row.image_error for row in cards)
    if any(row.priority is not None for row in cards) and not has_image:
        return "The score table has no paths of images, so no radiograph can be shown."
    return explain_unread_images(rows, paths)
