"""Labels that several radiologists agreed on: a table with an image column and one column per finding.

Two kinds of tables are read. The first is any one-hot table with columns named like our findings. The second holds
the adjudicated labels of NIH images (Majkowska et al., Radiology 2020), whose four columns differ from ours:

    Pneumothorax      one of our findings
    Nodule or mass    a composite of Mass and Nodule
    Airspace opacity  a composite of Consolidation, Edema, Infiltration and Pneumonia
    Fracture          not one of our findings; left out by name

A composite is present in an image where any of its findings is present. The score of a composite is the highest score
of its findings, and a composite is flagged where any of its findings is flagged. The findings of each composite are
fixed here by the meaning of the terms. Airspace opacity means that air spaces are filled, which holds for the four
findings above. Atelectasis is excluded: a collapsed lung loses its air and is not filled. The readers used the term in
the same way: in the table's `val` part, which holds no NIH test images, 41% of the 96 images with Atelectasis alone are
airspace opacities. Of the images with one of the four findings alone, 57 to 67% are, and of those with No Finding 23%.
Effusion is excluded too: it lies outside the lung, although most images with an effusion also have an opacity.

A third kind is a manifest (Parquet), such as `ray-cxr reviews` writes from the verdicts of readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from ray_cxr.data import identity, manifest, review_facts
from ray_cxr.data.csv_table import COLUMNS, KNOWN_HEADERS, CsvTable, normalize_header, read_csv
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, LABELS, canonicalize, suggest
from ray_cxr.storage import remote
from ray_cxr.storage.files import hash_file

#: Consensus labels that combine several of our findings, named as the table of 2020 names them.
COMPOSITES: dict[str, tuple[str, ...]] = {
    "Airspace opacity": ("Consolidation", "Edema", "Infiltration", "Pneumonia"),
    "Nodule or mass": ("Mass", "Nodule"),
}

_COLUMNS = {"image_id": COLUMNS["image_id"], "patient_id": COLUMNS["patient_id"], "part": ("setid", "split")}
_ADJUDICATED = frozenset({"fracture", "pneumothorax", "airspaceopacity", "noduleormass"})
_VALUES: Mapping[str, int] = {"": -1, "0": 0, "0.0": 0, "no": 0, "1": 1, "1.0": 1, "yes": 1}


@dataclass(frozen=True, eq=False)
class ConsensusLabels:
    """A consensus table."""

    image_ids: np.ndarray  # str objects [n], unique, in the order of the file
    patient_ids: np.ndarray  # str objects [n], None where unknown; written as in a manifest
    # str objects [n] or None: the table's own division (`val`, `test`), which differs from NIH's: the images of the
    # adjudicated table's `val` are in NIH's train and val.
    parts: np.ndarray
    labels: Mapping[str, np.ndarray]  # by finding, then by composite, int8 [n]; -1 where the table has no label
    composites: Mapping[str, tuple[str, ...]]  # the findings of each composite among the labels
    kind: Literal["adjudicated", "consensus"]  # the table of 2020, or any other
    source: str  # origin of the labels, as text
    digest: str  # SHA-256 of the file, hex
    notes: tuple[str, ...]  # sentences about how the table was mapped to our findings
    left_out: Mapping[str, str]  # reason by column, for unused columns that look like labels
    unused: tuple[str, ...]  # names of the other unused columns

    def __len__(self) -> int:
        return len(self.image_ids)


def read_consensus(path: str) -> ConsensusLabels:
    """Read a consensus table: a manifest, or CSV as `csv_table` reads it.

    Values are 0 and 1 (or NO and YES); blank means not judged. Columns of 0 and 1 that name none of our findings are
    listed in `left_out`. Repeated rows are merged; one image with different labels is an error.
    """
    if _is_parquet(path):
        return _read_manifest(path)
    table = read_csv(path)
    columns = table.find_columns(_COLUMNS)
    image_ids = table.read_image_ids(columns)
    label_columns = _find_labels(table)
    expected = "0 or 1 (NO or YES), or blank where it was not judged"
    rows = pd.DataFrame(
        {name: table.read_values(column, _VALUES, expected) for name, column in label_columns.items()},
        index=table.rows.index,
    )
    table.refuse_contradictions(rows)
    rows["image_id"] = image_ids
    written = table.read_patient_ids(columns.get("patient_id"))
    rows["patient_id"] = identity.unify_patients(image_ids, written)
    rows["part"] = table.read_optional(columns.get("part"))
    unique = _merge_repeats(rows, table)
    adjudicated = {normalize_header(name) for name in table.headers} >= _ADJUDICATED
    left_out, unused = _sort_unused(table, {*columns.values(), *label_columns.values()})
    composites = {name: COMPOSITES[name] for name in label_columns if name in COMPOSITES}
    return ConsensusLabels(
        image_ids=unique["image_id"].to_numpy(dtype=object),
        patient_ids=unique["patient_id"].to_numpy(dtype=object),
        parts=unique["part"].to_numpy(dtype=object),
        labels={name: unique[name].to_numpy(dtype=np.int8) for name in label_columns},
        composites=composites,
        kind="adjudicated" if adjudicated else "consensus",
        source=(
            "labels of NIH images adjudicated by radiologists (Majkowska et al., Radiology 2020)"
            if adjudicated
            else "a consensus table from the user"
        ),
        digest=hash_file(path),
        notes=tuple(_describe(composites, left_out, len(rows) - len(unique))),
        left_out=left_out,
        unused=unused,
    )


def _is_parquet(path: str) -> bool:
    try:
        with open(remote.to_path(path), "rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError:
        return False  # `read_csv` reports it


def _read_manifest(path: str) -> ConsensusLabels:
    """Return the labels of a manifest, without findings that it does not label."""
    table = manifest.read_manifest(path)
    facts = review_facts.read_facts(table.schema.metadata)
    labels = {name: pc.fill_null(table[name], -1).to_numpy() for name in LABELS if table[name].null_count < len(table)}
    if not labels:
        raise TableError(f"{path}: no image has a label; a consensus table needs some")
    image_ids = np.array(table["image_id"].to_pylist(), dtype=object)
    source = "a consensus table from the user"
    if facts is not None:
        source = f"verdicts of {facts.readers} reader{'s' * (facts.readers != 1)} ({facts.rule})"
    return ConsensusLabels(
        image_ids=image_ids,
        patient_ids=identity.unify_patients(image_ids, table["patient_id"].to_pylist()),
        parts=np.array(table["split"].to_pylist(), dtype=object),
        labels=labels,
        composites={},
        kind="consensus",
        source=source,
        digest=hash_file(path),
        notes=tuple(f"{line[:1].upper()}{line[1:]}." for line in facts.describe()) if facts else (),
        left_out={},
        unused=(),
    )


def composite_scores(members: Sequence[str], p: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the highest score of a composite's members in each image: float64 [n], NaN where any has no score.

    The probability that any of several findings is present is at least the highest of their probabilities. It is higher
    only as far as the findings occur independently. Do not mix raw and calibrated scores.
    """
    return np.asarray(np.max([np.asarray(p[finding], dtype=np.float64) for finding in members], axis=0))


def composite_flags(members: Sequence[str], flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the flag of a composite, int8 [n]: 1 where any member is 1, 0 where all are 0, -1 (unknown) elsewhere."""
    rows = np.stack([np.asarray(flags[finding], dtype=np.int8) for finding in members])
    return np.where((rows == 1).any(axis=0), 1, np.where((rows == 0).all(axis=0), 0, -1)).astype(np.int8)


def _find_labels(table: CsvTable) -> dict[str, str]:
    """Return headers by finding or composite: findings in `LABELS` order, then composites."""
    composites = {normalize_header(name): name for name in COMPOSITES}
    columns = table.find_labels(lambda header: canonicalize(header) or composites.get(normalize_header(header)))
    if not columns:
        raise TableError(
            f"{table.path}: has no column for any finding; a consensus table has one column of 0 and 1 per finding, "
            f"such as {FINDINGS[0]}; its columns are: {table.shown_headers()}"
        )
    return {label: columns[label] for label in (*LABELS, *COMPOSITES) if label in columns}


def _merge_repeats(rows: pd.DataFrame, table: CsvTable) -> pd.DataFrame:
    unique = rows.drop_duplicates()
    is_repeated = unique["image_id"].duplicated()
    if is_repeated.any():
        image = unique.loc[is_repeated, "image_id"].iloc[0]
        line = unique.index[unique["image_id"] == image][0]
        reason = f"{image} has other labels (or another patient or part) than on line {line}; keep one set per image"
        raise table.error(is_repeated, reason)
    return unique


def _sort_unused(table: CsvTable, used: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return unused columns that look like labels, with the reason; and the other unused columns."""
    left_out: dict[str, str] = {}
    unused: list[str] = []
    for column in table.headers:
        if column in used or column.startswith("Unnamed"):
            continue
        header = normalize_header(column)
        values = set(table.rows[column].str.strip().str.lower().unique())
        if header in KNOWN_HEADERS or not values <= set(_VALUES) or values == {""}:
            unused.append(column)
        elif header == "fracture":
            left_out[column] = "fracture is not one of the 14 findings, so it has no score"
        else:
            left_out[column] = f"it names none of the 14 findings{suggest(column, FINDINGS)}"
    return left_out, tuple(unused)


def _describe(composites: Mapping[str, tuple[str, ...]], left_out: Mapping[str, str], repeated: int) -> list[str]:
    notes = [
        f"The score of {name} is the highest score of {', '.join(members)}; it is flagged where any of them is."
        for name, members in composites.items()
    ]
    if "Airspace opacity" in composites:
        notes.append(
            "Atelectasis does not count as airspace opacity: a collapsed lung loses its air and is not filled."
        )
    notes += [f"Column {name} was left out: {reason}." for name, reason in left_out.items()]
    if repeated:
        notes.append(f"{repeated:,} rows repeat another row and were merged with it.")
    return notes
