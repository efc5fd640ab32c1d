"""A radiograph that a report shows: its image, heat map and boxes, and what labels and model state about it."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ray_cxr.errors import TableError
from ray_cxr.imaging.overlays import (
    EMPTY,
    Area,
    HeatMap,
    draw_overlay,
    has_heatmaps,
    read_evidence,
    read_heatmaps,
    scale_to_side,
)
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting.plots import format_finding
from ray_cxr.reporting.scores import Scores

#: Longer side of an image in a report, pixels: smaller images are enlarged to the first, larger ones reduced.
SIDES = (384, 768)
#: Quality as WebP: a radiograph of 768 pixels has about 25 KB.
_QUALITY = 80


@dataclass(frozen=True)
class Box:
    """A radiologist's box for a finding; edges are fractions of the image's sides."""

    finding: str
    area: Area


@dataclass(frozen=True)
class Judgement:
    """What the labels and the model state about a finding in an image; None is unknown."""

    finding: str
    label: bool | None
    p: float | None
    threshold: float | None
    flagged: bool | None


@dataclass(frozen=True, eq=False)
class Case:
    """A radiograph of a report.

    Attributes:
        finding: the finding that it is an example of; None for an image of a random sample.
        judgements: of that finding first, then of others that are labelled positive or flagged, in canonical order.
        image: uint8 [H,W], or None with an error `code`.
        overlay: the heat map of `finding` over the image, uint8 [H,W,3]; None without a map, for the reason
            `no_overlay`, which is empty if no map was wanted.
        boxes: of all findings.
        note: view, sex and age, as far as they are known.
    """

    image_id: str
    finding: str | None
    judgements: tuple[Judgement, ...]
    is_labelled: bool
    image: np.ndarray | None
    code: str | None = None
    overlay: np.ndarray | None = None
    no_overlay: str = ""
    boxes: tuple[Box, ...] = ()
    note: str = ""

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(f for f in FINDINGS for j in self.judgements if j.finding == f and j.label)

    @property
    def flagged(self) -> tuple[str, ...]:
        return tuple(f for f in FINDINGS for j in self.judgements if j.finding == f and j.flagged)


#: Cases under a common title.
Band = tuple[str, list[Case]]


class CaseBuilder:
    """Builds cases from a score table; a damaged image can crash only the decoder's child process.

    Args:
        boxes: by image id.
    """

    def __init__(self, table: Scores, boxes: Mapping[str, Sequence[Box]], decoder: Decoder) -> None:
        self._table, self._boxes, self._decoder = table, boxes, decoder

    def build(self, row: int, finding: str | None, labels: Mapping[str, int] | None, note: str = "") -> Case:
        """Build the case of a row of the table; `labels` per finding are 0, 1, or -1 for unknown; None: no labels."""
        image, code = load_image(self._table.paths[row], self._decoder)
        if image is not None:
            image = scale_to_side(image, int(np.clip(max(image.shape), *SIDES)))
        judged = {f: self._judge(row, f, labels) for f in FINDINGS if f in self._table.findings or labels is not None}
        shown = [f for f, j in judged.items() if f != finding and (j.label or j.flagged)]
        image_id = str(self._table.ids[row])
        return Case(
            image_id=image_id,
            finding=finding,
            judgements=tuple(judged[f] for f in ([finding] if finding is not None else []) + shown),
            is_labelled=labels is not None and any(label >= 0 for f, label in labels.items() if f != NO_FINDING),
            image=image,
            code=code,
            boxes=tuple(self._boxes.get(image_id, ())),
            note=note,
        )

    def _judge(self, row: int, finding: str, labels: Mapping[str, int] | None) -> Judgement:
        table = self._table
        label = -1 if labels is None else labels.get(finding, -1)
        p = float(table.p[finding][row]) if finding in table.p else np.nan
        flag = int(table.flags[finding][row]) if finding in table.flags else -1
        return Judgement(
            finding,
            None if label < 0 else bool(label),
            None if np.isnan(p) else p,
            table.threshold(finding),
            None if flag < 0 else bool(flag),
        )


@dataclass(frozen=True)
class MapCount:
    """Heat maps of flagged findings: their number, how many of them are empty, and their method if it is known."""

    flagged: int
    empty: int
    method: str | None


class HeatMapReader:
    """Reads the heat maps that a page shows; a damaged file costs all maps of the page, but not the page.

    Attributes:
        notes: on the page, why it shows no maps.
    """

    def __init__(self, table: Scores) -> None:
        self._table = table
        self._folders = {folder for folder in table.folders if has_heatmaps(folder)}
        self.notes: list[str] = []

    @property
    def has_maps(self) -> bool:
        return bool(self._folders) and not self.notes

    def read(self, image_ids: Collection[str]) -> dict[tuple[str, str], HeatMap]:
        """Return the maps of these images by image id and finding."""
        if not self.has_maps or not len(image_ids):
            return {}
        grouped = self._table.group_by_folder(image_ids).items()
        try:
            maps = [read_heatmaps(folder, found) for folder, found in grouped if folder in self._folders]
            return {key: heatmap for found in maps for key, heatmap in found.items()}
        except TableError as error:
            self.notes.append(f"Heat maps are left out: {error}.")
            return {}

    def count_flagged(self, rows: np.ndarray) -> MapCount | None:
        """Count the heat maps of flagged findings in these rows of the table; None without heat maps."""
        if not self.has_maps:
            return None
        ids = self._table.ids[rows]
        try:
            grouped = self._table.group_by_folder(ids).items()
            evidence = {
                key: value
                for folder, found in grouped
                if folder in self._folders
                for key, value in read_evidence(folder).items()
                if key[0] in found
            }
        except TableError as error:
            self.notes.append(f"Heat maps are left out: {error}.")
            return None
        flags = {finding: flags[rows] for finding, flags in self._table.flags.items() if finding != NO_FINDING}
        keys = [(image_id, finding) for finding, flagged in flags.items() for image_id in ids[flagged == 1]]
        mapped = [evidence[key] for key in keys if key in evidence]
        method = (self._table.run.get("heatmaps") or {}).get("method")
        return MapCount(len(mapped), sum(value == 0 for value in mapped), method)


def load_image(path: str | None, decoder: Decoder) -> tuple[np.ndarray | None, str | None]:
    """Return an image in its own size, or its error code."""
    decoded = decoder.load(path)
    return (None, decoded.code) if isinstance(decoded, Failure) else (decoded.images[0], None)


def add_heatmap(case: Case, heatmap: HeatMap | None) -> Case:
    """Return the case with a heat map over its image, or with the reason why there is none."""
    if heatmap is None:
        return replace(case, no_overlay="the score is not among the image's highest")
    if heatmap.evidence == 0:
        return replace(case, no_overlay=f"the heat map is empty: {EMPTY}")
    if case.image is not None:
        overlay = draw_overlay(case.image, heatmap.cells, heatmap.area, side=max(case.image.shape))
        return replace(case, overlay=overlay)
    if heatmap.overlay is None:
        return replace(case, no_overlay="the image cannot be read")
    try:
        with Image.open(heatmap.overlay) as file:
            return replace(case, overlay=np.asarray(file.convert("RGB")))
    except OSError:
        return replace(case, no_overlay=f"{heatmap.overlay.name} cannot be read")


def encode_webp(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()


def format_p(value: float | None, other: float | None = None) -> str:
    """Format a probability: `0.702`, `< 0.001`.

    With the `other` of a probability and its threshold it has more digits, if the two would look the same.
    """
    if value is None:
        return "–"
    steps = range(3, 10) if other is not None and other != value else (3,)
    texts = [[_round_p(number, digits) for number in (value, other)] for digits in steps]
    return next((text for text, second in texts if text != second), texts[-1][0])


def _round_p(value: float | None, digits: int) -> str:
    return "" if value is None else "< 0.001" if digits == 3 and value < 0.001 else f"{value:.{digits}f}"


def describe_labels(case: Case) -> str:
    """Return the findings by label, for a case of a random sample."""
    if not case.is_labelled:
        return "not labelled"
    return ", ".join(map(format_finding, case.positives)) or "no finding"
