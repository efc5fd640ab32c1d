"""The first rows of the worklist on the page: studies with their highest findings, radiograph and heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.overlays import HeatMap, draw_overlay, scale_to_side
from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.cases import HeatMapReader, encode_webp, load_image
from ray_cxr.reporting.plots import format_finding
from ray_cxr.reporting.scores import Scores
from ray_cxr.reporting.worklist import Worklist, is_doubtful

#: Rows with images, and rows of the table.
CARDS, ROWS = 10, 25
#: Findings per row: flagged ones, filled up with others to `_AT_LEAST`.
_AT_LEAST, _AT_MOST = 3, 5
#: Longer side of an image on the page, pixels; as WebP it has about 5 kB.
_SIDE = 320
_NO_FLAGS = np.zeros(0, dtype=np.int8)


@dataclass(frozen=True)
class FindingScore:
    """A study's probabilities of a finding, None if unknown, and whether an image of the study is flagged for it.

    Attributes:
        image_id: the image that has them; None if it is the image of the row.
        flagged_here: whether the image of the row is flagged.
    """

    finding: str
    p: float | None
    c: float | None
    threshold: float | None
    flagged: bool
    image_id: str | None
    flagged_here: bool


@dataclass(frozen=True)
class StudyRow:
    """A row of the worklist on the page; images are WebP.

    Attributes:
        line: the columns of text of worklist.csv.
        findings: flagged ones first, the highest first; `hidden` flagged findings more.
        image: the radiograph; None if it was not loaded or cannot be read, then with an `image_error`.
        heatmap: the image with the heat map of the finding `heatmap_finding`; None without one.
        no_heatmap: why not; empty if the scores have no heat maps.
        has_empty_map: whether it is None because no cell of the map is above 0.
        reason: why the row is the first of the worklist; empty for other rows.
    """

    line: dict[str, str]
    priority: float | None
    abnormality: float | None
    findings: list[FindingScore]
    hidden: int
    image: bytes | None = None
    image_error: str | None = None
    heatmap: bytes | None = None
    heatmap_finding: str | None = None
    no_heatmap: str = ""
    has_empty_map: bool = False
    reason: str = ""


def list_rows(table: Scores, worklist: Worklist, maps: HeatMapReader) -> list[StudyRow]:
    """Return the first rows of a worklist of this table, the first `CARDS` of them with images."""
    rows = [_build_row(table, worklist, place) for place in range(min(ROWS, len(worklist.lines)))]
    rows[:1] = [replace(row, reason=explain_first(worklist)) for row in rows[:1]]
    images = [study[0] for study in worklist.rows[:CARDS]]
    return [*add_images(rows[:CARDS], table, images, maps), *rows[CARDS:]]


def explain_first(worklist: Worklist) -> str:
    """Return why the first row of a worklist is the first; nothing for a single row or without a priority."""
    line, n = worklist.lines[0], len(worklist.lines)
    if n < 2 or np.isnan(worklist.priority[0]):
        return ""
    n_flagged = sum(bool(line["flagged"]) for line in worklist.lines)
    if n_flagged == 1:
        return f"First because it is the only row with a flag ({_list(line['flagged'])})."
    n_doubtful = sum(is_doubtful(line) for line in worklist.lines)
    rows = f"all {n:,} rows, none of which has a flag"
    if n_flagged:
        rows = f"the {n_flagged:,} rows with a flag"
    elif n_doubtful:
        rows = f"{count_of(n_doubtful, 'row')} with a quality flag or an image without a score; no row has a flag"
    # A table of another system can have its own priority.
    of_all = (
        "its calibrated probabilities combined" if worklist.c and worklist.combines else "its probabilities combined"
    )
    of_all = of_all if worklist.combines else "a column of the scores"
    left_out = f", without {_list(line['flagged_unranked'])}" if line["flagged_unranked"] else ""
    return f"First because it has the highest priority ({of_all}{left_out}) of {rows}."


def _list(findings: str) -> str:
    return ", ".join(map(format_finding, findings.split("|")))


def _build_row(table: Scores, worklist: Worklist, place: int) -> StudyRow:
    line, images = worklist.lines[place], worklist.rows[place]
    flagged = set(line["flagged"].split("|"))
    found = [
        FindingScore(
            finding,
            _number(worklist.p[finding][place]),
            _number(worklist.c[finding][place]) if finding in worklist.c else None,
            table.threshold(finding),
            finding in flagged,
            _find_other_image(table, images, finding),
            finding in table.flags and table.flags[finding][images[0]] == 1,
        )
        for finding in worklist.p
        if finding != NO_FINDING and not np.isnan(worklist.p[finding][place])
    ]
    # As the priority: by calibrated probabilities, if there are any.
    calibrated = any(score.c is not None for score in found)
    found.sort(key=lambda score: (not score.flagged, -((score.c if calibrated else score.p) or 0.0)))
    n_flagged = sum(score.flagged for score in found)
    shown = found[: min(_AT_MOST, max(_AT_LEAST, n_flagged))]
    # A finding that cannot be flagged has often the highest raw probability, and a reader should know it.
    highest = max(found, key=lambda score: score.p or 0.0, default=None)
    if highest is not None and highest not in shown and not (table.flags.get(highest.finding, _NO_FLAGS) >= 0).any():
        shown.append(highest)
    priority, abnormality = (_number(values[place]) for values in (worklist.priority, worklist.abnormality))
    return StudyRow(line, priority, abnormality, shown, n_flagged - sum(score.flagged for score in shown))


def _find_other_image(table: Scores, rows: Sequence[int], finding: str) -> str | None:
    """Return the id of the image with the highest probability of these rows, if it is not the first."""
    best = int(np.nanargmax(table.p[finding][rows]))
    return str(table.ids[rows[best]]) if best else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def add_images(
    studies: Sequence[StudyRow], table: Scores, rows: Sequence[int], reader: HeatMapReader | None
) -> list[StudyRow]:
    """Add radiographs of the images in these rows of the table, and with a `reader` heat maps."""
    with Decoder([None]) as decoder:
        decoder.start()
        maps = {} if reader is None else reader.read(table.ids[rows])
        return [_add_image(study, table, row, maps, decoder) for study, row in zip(studies, rows, strict=True)]


def _add_image(
    study: StudyRow, table: Scores, row: int, maps: dict[tuple[str, str], HeatMap], decoder: Decoder
) -> StudyRow:
    """Add the radiograph in a row of the table, and a heat map of the first finding that is flagged on it and has one.

    In a study without flags it is the first finding that has one, of those whose probability is that of this image.
    """
    if not table.ok[row]:
        return replace(study, image_error=table.codes[row] or "unknown")
    if table.paths[row] is None:
        return study
    image, code = load_image(table.paths[row], decoder)
    if image is None:
        return replace(study, image_error=code)
    image = scale_to_side(image, _SIDE)
    study = replace(study, image=encode_webp(image))
    if not maps:
        return study
    findings = [score.finding for score in study.findings if score.flagged_here]
    if not any(score.flagged for score in study.findings):
        findings = [score.finding for score in study.findings if score.image_id is None]
    image_id = table.ids[row]
    for finding in findings:
        heatmap = maps.get((image_id, finding))
        if heatmap is not None and heatmap.evidence > 0:
            overlay = draw_overlay(image, heatmap.cells, heatmap.area, side=_SIDE)
            return replace(study, heatmap=encode_webp(overlay), heatmap_finding=finding)
    is_empty = bool(findings) and (image_id, findings[0]) in maps
    return replace(study, no_heatmap=_explain_no_map(maps, image_id, findings), has_empty_map=is_empty)


def _explain_no_map(maps: dict[tuple[str, str], HeatMap], image_id: str, findings: Sequence[str]) -> str:
    if not findings:
        return "no heat map: this image has no flag"
    of_image = [finding for name, finding in maps if name == image_id]
    name = format_finding(findings[0])
    if findings[0] in of_image:
        return f"empty heat map of {name}"
    if not of_image:
        return f"no heat map of {name}: the image has no heat maps"
    highest = "the highest finding" if len(of_image) == 1 else f"one of the {len(of_image)} highest findings"
    return f"no heat map of {name}: not {highest}"
