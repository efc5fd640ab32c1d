"""Labels that radiologists agreed on, from a table of their own: an image column and one column per finding.

Two kinds are known. Any table with one-hot columns named like our findings; and the adjudicated labels of NIH
images (Majkowska et al., Radiology 2020), whose four columns are not quite ours:

    Pneumothorax      ours
    Nodule or mass    ours in two: Mass, Nodule
    Airspace opacity  ours in four: Consolidation, Edema, Infiltration, Pneumonia
    Fracture          not ours; left out by name

A composite is present where any of its findings is; its score is the highest of theirs, and it is flagged where any
of them is. Which findings make up a composite is fixed here, and by what the words mean. Airspace opacity is air
spaces filled with something else. That holds of the four. Atelectasis is not among them: a collapsed lung loses
its air and is filled with nothing, and plate-like ones are lines. It agrees with how the readers used the words: in
the table's `val` part, which is none of NIH's test images, 41% of the 96 images that NIH labels with Atelectasis alone
are airspace opacities, against 57 to 67% for each of the four alone and 23% for No Finding. Effusion is not among them
either, though most images with one have an opacity too: it lies outside the lung. Mass and Nodule have a composite of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from ray_cxr.data import identity, manifest
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING, canonical, suggestion

#: What a consensus may name that is several of our findings, under the name that the table of 2020 gives it.
COMPOSITES: dict[str, tuple[str, ...]] = {
    "Airspace opacity": ("Consolidation", "Edema", "Infiltration", "Pneumonia"),
    "Nodule or mass": ("Mass", "Nodule"),
}

_ADJUDICATED = frozenset({"fracture", "pneumothorax", "airspaceopacity", "noduleormass"})
_VALUES = {"": -1, "0": 0, "0.0": 0, "no": 0, "1": 1, "1.0": 1, "yes": 1}
_FRACTURE = "none of the 14 findings is a fracture, so no score stands for it"


@dataclass(frozen=True, eq=False)
class ConsensusLabels:
    """A consensus table as read.

    Attributes:
        image_ids: str objects [n], each once, in the order of the file.
        patient_ids: str objects [n], None where the table does not say; written as a manifest writes them.
        parts: str objects [n], the table's own division (`val`, `test`), None where it has none. It is not NIH's:
            the `val` of the adjudicated table lies in NIH's train and val images.
        labels: by finding, then by composite, int8 [n]: 1, 0, and -1 where the table says nothing.
        composites: for each composite among the labels, the findings whose scores stand for it.
        kind: `adjudicated` for the table of 2020, `consensus` for any other.
        source: where the labels come from, in words.
        digest: SHA-256 of the file, hex.
        notes: what a reader should know of how the table was mapped, as sentences.
        left_out: columns that look like labels and were not used, with the reason.
        unused: other columns that were not used.
    """

    image_ids: np.ndarray
    patient_ids: np.ndarray
    parts: np.ndarray
    labels: Mapping[str, np.ndarray]
    composites: Mapping[str, tuple[str, ...]]
    kind: Literal["adjudicated", "consensus"]
    source: str
    digest: str
    notes: tuple[str, ...]
    left_out: Mapping[str, str]
    unused: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def of_part(self, part: str) -> ConsensusLabels:
        """The rows of one of the table's own parts.

        Raises:
            TableError: it has no such rows.
        """
        chosen = self.parts == part
        if not chosen.any():
            there = ", ".join(sorted({str(name) for name in self.parts if name is not None})) or "none"
            raise TableError(f"the consensus table has no part {part!r}; its parts are: {there}")
        return replace(
            self,
            image_ids=self.image_ids[chosen],
            patient_ids=self.patient_ids[chosen],
            parts=self.parts[chosen],
            labels={name: values[chosen] for name, values in self.labels.items()},
        )


def read_consensus(path: str) -> ConsensusLabels:
    """Read a consensus table, CSV or gzipped CSV.

    Values are 0 and 1 (or NO and YES), blank where a finding was not judged. A column of 0 and 1 that names no
    finding of ours is left out by name. A repeated row is taken once; the same image with other labels is an error.

    Raises:
        TableError: no such file, no image column, no column for any finding, a value that is neither 0 nor 1, No
            Finding together with a finding, one image with two sets of labels.
    """
    raw = manifest._read_csv(path)
    if not len(raw):
        raise TableError(f"{path}: the table has a header but no rows")
    places = _places(raw, path)
    ids = raw[places["image_id"]].str.strip()
    if (ids == "").any():
        raise TableError(f"{path}: line {manifest._line(ids == '')} has no image name")
    for name in identity.COLUMNS:
        if name in places:
            identity.check_series(raw[places[name]], path, images=name == "image_id")
    columns = _label_columns(raw, path)
    table = pd.DataFrame({name: _values(raw[column], path) for name, column in columns.items()}, index=raw.index)
    _refuse_clash(table, path)
    table["image_id"] = ids
    table["patient_id"] = manifest._patients(raw, places, ids)
    table["part"] = manifest._nullable(raw[places["part"]]) if "part" in places else None
    once, repeated = _once(table, path)
    words = {manifest._word(str(name)) for name in raw.columns}
    kind: Literal["adjudicated", "consensus"] = "adjudicated" if words >= _ADJUDICATED else "consensus"
    left_out, unused = _rest(raw, {*places.values(), *columns.values()})
    composites = {name: COMPOSITES[name] for name in columns if name in COMPOSITES}
    return ConsensusLabels(
        image_ids=once["image_id"].to_numpy(dtype=object),
        patient_ids=_or_none(once["patient_id"]),
        parts=_or_none(once["part"]),
        labels={name: once[name].to_numpy(dtype=np.int8) for name in columns},
        composites=composites,
        kind=kind,
        source=(
            "labels of NIH images adjudicated by radiologists (Majkowska et al., Radiology 2020)"
            if kind == "adjudicated"
            else "a consensus table given by the user"
        ),
        digest=manifest._sha256(path),
        notes=tuple(_notes(composites, left_out, repeated)),
        left_out=left_out,
        unused=unused,
    )


def composite_scores(name: str, members: Sequence[str], p: Mapping[str, np.ndarray]) -> np.ndarray:
    """The score of a composite: for each image the highest of its findings'.

    The probability that any of several findings is there is at least the highest of theirs, and more than that only
    so far as they come without one another. Raw and calibrated scores must not be mixed.

    Args:
        name: of the composite, for the error.
        members: its findings.
        p: by finding, floats [n], NaN where there is no score.

    Returns:
        float64 [n], NaN where any of the findings has no score.

    Raises:
        TableError: `p` lacks a finding: a maximum over the others would be another quantity.
    """
    _refuse_missing(name, members, p, "score")
    return np.asarray(np.max(np.stack([np.asarray(p[finding], dtype=np.float64) for finding in members]), axis=0))


def composite_flags(name: str, members: Sequence[str], flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether a composite is flagged: where any of its findings is.

    Args:
        name, members: as `composite_scores`.
        flags: by finding, whole numbers or bools [n]: 1, 0, and -1 where it is not known.

    Returns:
        int8 [n]: 1 where any is 1, 0 where all are 0, -1 elsewhere.

    Raises:
        TableError: `flags` lacks a finding.
    """
    _refuse_missing(name, members, flags, "flag")
    rows = np.stack([np.asarray(flags[finding], dtype=np.int8) for finding in members])
    return np.where((rows == 1).any(axis=0), 1, np.where((rows == 0).all(axis=0), 0, -1)).astype(np.int8)


def _refuse_missing(name: str, members: Sequence[str], there: Mapping[str, np.ndarray], what: str) -> None:
    missing = [finding for finding in members if finding not in there]
    if missing:
        raise TableError(
            f"{name}: needs a {what} of each of {', '.join(members)}; there is none of {', '.join(missing)}, "
            "so leave the composite out or use a model that gives all of them"
        )


def _places(raw: pd.DataFrame, path: str) -> dict[str, str]:
    """The columns that say which image, which patient, which part."""
    known = {name: manifest._COLUMNS[name] for name in ("image_id", "patient_id")} | {"part": ("setid", "split")}
    words = {manifest._word(str(name)): str(name) for name in reversed(list(raw.columns))}
    found = {
        name: next((words[word] for word in spellings if word in words), None) for name, spellings in known.items()
    }
    if found["image_id"] is None:
        raise TableError(
            f"{path}: has no image column ('Image Index' or 'Image'); its columns are: {manifest._shown(raw.columns)}"
        )
    return {name: column for name, column in found.items() if column is not None}


def _label_columns(raw: pd.DataFrame, path: str) -> dict[str, str]:
    """Columns by the finding or composite that they name: findings in `LABELS` order, then composites."""
    composites = {manifest._word(name): name for name in COMPOSITES}
    found: dict[str, str] = {}
    for column in map(str, raw.columns):
        label = canonical(column) or composites.get(manifest._word(column))
        if label is None:
            continue
        if label in found:
            raise TableError(f"{path}: {found[label]!r} and {column!r} both spell {label}; remove one of the two")
        found[label] = column
    if not found:
        raise TableError(
            f"{path}: has no column for any finding; a consensus table has one column of 0 and 1 per finding, named as "
            f"{FINDINGS[0]}; its columns are: {manifest._shown(raw.columns)}"
        )
    return {label: found[label] for label in (*LABELS, *COMPOSITES) if label in found}


def _values(text: pd.Series, path: str) -> pd.Series:
    words = text.str.strip().str.lower()
    bad = ~words.isin(list(_VALUES))
    if bad.any():
        raise TableError(
            f"{path}: line {manifest._line(bad)}: {text.name} is {text[bad].iloc[0].strip()!r}; "
            "use 0 or 1 (NO or YES), or blank where it was not judged"
        )
    return words.map(_VALUES).astype("int8")


def _refuse_clash(table: pd.DataFrame, path: str) -> None:
    if NO_FINDING not in table:
        return
    clash = (table[NO_FINDING] == 1) & (table.drop(columns=NO_FINDING) == 1).any(axis=1)
    if clash.any():
        raise TableError(f"{path}: line {manifest._line(clash)}: No Finding is 1 together with a finding; mend the row")


def _once(table: pd.DataFrame, path: str) -> tuple[pd.DataFrame, int]:
    """The table with each image once, and how many rows were repeats of another."""
    once = table.drop_duplicates()
    again = once["image_id"].duplicated()
    if again.any():
        image = once.loc[again, "image_id"].iloc[0]
        first = once.index[(once["image_id"] == image).to_numpy()][0]
        raise TableError(
            f"{path}: line {manifest._line(again)}: {image} has other labels (or another patient or part) than on "
            f"line {first}; a consensus has one set per image"
        )
    return once, len(table) - len(once)


def _rest(raw: pd.DataFrame, used: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Columns not used: those that look like labels, with why; and the others."""
    known = {word for words in manifest._COLUMNS.values() for word in words}
    left_out: dict[str, str] = {}
    unused: list[str] = []
    for column in map(str, raw.columns):
        if column in used or column.startswith("Unnamed"):
            continue
        word = manifest._word(column)
        values = set(raw[column].str.strip().str.lower().unique())
        if word in known or not values <= set(_VALUES) or values == {""}:
            unused.append(column)
        elif word == "fracture":
            left_out[column] = _FRACTURE
        else:
            left_out[column] = f"names no finding of ours{suggestion(column, FINDINGS)}"
    return left_out, tuple(unused)


def _notes(composites: Mapping[str, tuple[str, ...]], left_out: Mapping[str, str], repeated: int) -> list[str]:
    notes = [
        f"{name} is scored by the highest score of {', '.join(members)}, and flagged where any of them is."
        for name, members in composites.items()
    ]
    if "Airspace opacity" in composites:
        notes.append(
            "Atelectasis does not count as airspace opacity: a collapsed lung loses its air and is filled with nothing."
        )
    notes += [f"Column {name} was left out: {reason}." for name, reason in left_out.items()]
    if repeated:
        notes.append(f"{repeated:,} rows that repeat another were taken once.")
    return notes


def _or_none(column: pd.Series) -> np.ndarray:
    return column.astype("object").where(column.notna(), None).to_numpy(dtype=object)
