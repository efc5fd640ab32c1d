"""Label tables of other hospitals: CheXpert, PadChest, and VinDr-CXR with VinBigData.

docs/external-validation.md has the policies: what is mapped to which finding, and what stays unlabelled.

Each dialect is rewritten into a one-hot table, which `OneHotDialect` then reads.

Sources: Irvin et al., CheXpert, AAAI 2019; Bustos et al., PadChest, Medical Image Analysis 2020; Nguyen et al.,
VinDr-CXR, Scientific Data 2022.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from ray_cxr.data.csv_table import CsvTable
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING

_PATIENT = re.compile(r"patient\d+")

#: Column of CheXpert by finding. `Lung Lesion` is a nodule or a mass, and `Pleural Other` more than pleural thickening.
_CHEXPERT = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
#: Its other columns of diseases; `Support Devices` are none.
_CHEXPERT_OTHERS = ("Enlarged Cardiomediastinum", "Lung Opacity", "Lung Lesion", "Pleural Other", "Fracture")

#: Labels of PadChest by finding. A label of PadChest's tree counts for the labels above it.
_PADCHEST = {
    "Atelectasis": (
        *("atelectasis", "atelectasis basal", "laminar atelectasis", "lobar atelectasis", "round atelectasis"),
        *("segmental atelectasis", "total atelectasis"),
    ),
    "Cardiomegaly": ("cardiomegaly",),
    "Consolidation": ("consolidation", "air bronchogram"),
    "Edema": ("pulmonary edema",),
    "Effusion": (
        *("pleural effusion", "loculated pleural effusion", "loculated fissural effusion", "hydropneumothorax"),
        *("empyema", "hemothorax"),
    ),
    "Emphysema": ("emphysema",),
    "Fibrosis": ("pulmonary fibrosis", "post radiotherapy changes", "asbestosis signs"),
    "Hernia": ("hiatal hernia",),
    "Infiltration": (
        *("infiltrates", "interstitial pattern", "ground glass pattern", "reticular interstitial pattern"),
        *("reticulonodular interstitial pattern", "miliary opacities", "alveolar pattern", "consolidation"),
        "air bronchogram",
    ),
    "Mass": ("pulmonary mass",),
    "Nodule": ("nodule", "multiple nodules"),
    "Pleural_Thickening": ("pleural thickening", "apical pleural thickening", "calcified pleural thickening"),
    "Pneumonia": ("pneumonia", "atypical pneumonia"),
    "Pneumothorax": ("pneumothorax", "hydropneumothorax"),
}
#: Labels of PadChest that say that the report is not complete: findings that it does not name are unlabelled.
_PADCHEST_INCOMPLETE = frozenset({"", "exclude", "suboptimal study", "unchanged"})
#: Labels of PadChest above several findings: which of them is unknown.
_PADCHEST_UNCLEAR = {"mass": "Mass", "infiltrates": "Consolidation", "alveolar pattern": "Consolidation"}

#: Class of VinDr-CXR by finding. `Nodule/Mass` is one class.
_VINDR = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural effusion",
    "Emphysema": "Emphysema",
    "Fibrosis": "Pulmonary fibrosis",
    "Infiltration": "Infiltration",
    "Pleural_Thickening": "Pleural thickening",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    NO_FINDING: "No finding",
}
#: Classes that VinBigData leaves out; a table of boxes names all others, even if it has no box of one.
_VINDR_ONLY = ("Edema", "Emphysema", "Pneumonia")


def rewrite_external(table: CsvTable) -> CsvTable | None:
    """Return a table of another hospital as a one-hot table; None if it is of no known hospital."""
    headers = set(table.headers)
    if {"Path", "Pleural Effusion", "Enlarged Cardiomediastinum"} <= headers:
        return _rewrite_chexpert(table)
    if {"ImageID", "MethodLabel", "Labels"} <= headers:
        return _rewrite_padchest(table)
    if {"image_id", "class_name"} <= headers or {"image_id", "Pleural effusion", "Nodule/Mass"} <= headers:
        return _rewrite_vindr(table)
    return None


def _rewrite_chexpert(table: CsvTable) -> CsvTable:
    """An uncertain label (-1) and a blank stay unlabelled, except that No Finding is 1: then blanks are 0."""
    rows = table.rows
    parts = rows["Path"].str.strip().str.split("/")
    out = pd.DataFrame(index=rows.index)
    # Without the folder of the release, which differs between its sizes: train/patient00001/study1/view1_frontal.jpg
    out["image_id"] = parts.map(lambda names: "/".join(names[-4:]))
    out["patient_id"] = parts.map(lambda names: next((name for name in names if _PATIENT.fullmatch(name)), ""))
    out["study_id"] = parts.map(lambda names: "/".join(names[-3:-1]))
    for name in ("Sex", "Age", "Frontal/Lateral", "AP/PA"):
        if name in rows:
            out[name] = rows[name]
    known = {"1.0": "1", "1": "1", "0.0": "0", "0": "0", "-1.0": "", "-1": "", "": ""}
    columns = [*_CHEXPERT.values(), *_CHEXPERT_OTHERS, "No Finding"]
    # A column that a part of the table leaves out is not labelled.
    cells = pd.DataFrame({name: _translate(table, name, known) if name in rows else "" for name in columns}, rows.index)
    normal = cells["No Finding"] == "1"
    for finding, name in _CHEXPERT.items():
        out[finding] = cells[name].mask(normal & (cells[name] == ""), "0")
    is_sick = (cells.drop(columns="No Finding") == "1").any(axis=1)
    out[NO_FINDING] = cells["No Finding"].mask(is_sick, "0")
    return _finish(table, out)


def _translate(table: CsvTable, column: str, known: Mapping[str, str]) -> pd.Series:
    text = table.rows[column].str.strip()
    is_bad = ~text.isin(list(known))
    if is_bad.any():
        raise table.error(is_bad, f"{column} is {text[is_bad].iloc[0]!r}; CheXpert has 1.0, 0.0, -1.0 and blank")
    return text.map(known)


def _rewrite_padchest(table: CsvTable) -> CsvTable:
    """Only labels that physicians read from the reports count; those of PadChest's network stay unlabelled."""
    rows = table.rows
    out = pd.DataFrame(index=rows.index)
    out["image_id"] = rows["ImageID"]
    for name, column in (("patient_id", "PatientID"), ("study_id", "StudyID"), ("sex", "PatientSex_DICOM")):
        out[name] = rows.get(column, "")
    out["view"] = rows.get("Projection", "")
    if {"StudyDate_DICOM", "PatientBirth"} <= set(rows.columns):
        # The year of birth alone is published.
        years = pd.to_numeric(rows["StudyDate_DICOM"].str.slice(0, 4), errors="coerce") - pd.to_numeric(
            rows["PatientBirth"], errors="coerce"
        )
        out["age"] = years.map(lambda value: "" if np.isnan(value) else f"{value:.0f}")
    by_physician = rows["MethodLabel"].str.strip() == "Physician"
    encoded = {text: _encode_padchest(text) for text in rows["Labels"].unique()}
    if not any(encoded.values()):
        raise table.error(rows["Labels"] != "", "Labels is no list of PadChest's labels, such as ['normal']")
    nothing = dict.fromkeys(LABELS, "")
    cells = [
        encoded[text] or nothing if use else nothing for text, use in zip(rows["Labels"], by_physician, strict=True)
    ]
    return _finish(table, out.join(pd.DataFrame(cells, index=rows.index, columns=list(LABELS))))


def _encode_padchest(text: str) -> dict[str, str] | None:
    """Return the label of each finding; None if the cell is no list."""
    try:
        listed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return None
    names = {name.strip().lower() for name in listed} or {""}
    is_complete = not names & _PADCHEST_INCOMPLETE
    cells = dict.fromkeys(LABELS, "0" if is_complete else "")
    cells |= {finding: "" for unclear, finding in _PADCHEST_UNCLEAR.items() if unclear in names}
    cells |= {finding: "1" for finding, spellings in _PADCHEST.items() if names.intersection(spellings)}
    cells[NO_FINDING] = "1" if names == {"normal"} else "0" if is_complete or "1" in cells.values() else ""
    return cells


def _rewrite_vindr(table: CsvTable) -> CsvTable:
    """A finding is 1 if more than half of an image's readers report it, 0 if none does; otherwise it is unlabelled."""
    rows = table.rows.assign(image_id=table.rows["image_id"].str.strip())
    reader = rows["rad_id"].str.strip() if "rad_id" in rows else pd.Series("", index=rows.index)
    first = rows.drop_duplicates("image_id")
    readers = reader.groupby(rows["image_id"], sort=False).nunique()
    if "class_name" in rows:
        named = rows["class_name"].str.strip()
        present = {finding: named == name for finding, name in _VINDR.items()}
        labelled = {finding for finding, marks in present.items() if marks.any() or finding not in _VINDR_ONLY}
    else:
        present = {
            finding: rows[name].str.strip().isin(("1", "1.0")) for finding, name in _VINDR.items() if name in rows
        }
        labelled = set(present)
    out = pd.DataFrame({"image_id": first["image_id"]}, index=first.index)
    for finding in LABELS:
        out[finding] = ""
        if finding not in labelled:
            continue
        marks = present[finding]
        votes = reader[marks].groupby(rows.loc[marks, "image_id"]).nunique()
        share = out["image_id"].map(votes).fillna(0) / out["image_id"].map(readers)
        out[finding] = np.select([share > 0.5, share == 0], ["1", "0"], "")
    _separate_no_finding(out)
    return _finish(table, out)


def _separate_no_finding(out: pd.DataFrame) -> None:
    """Where readers disagree whether there is a finding, a majority for a finding decides against No Finding."""
    sick = (out[list(FINDINGS)] == "1").any(axis=1)
    out[NO_FINDING] = out[NO_FINDING].mask(sick, "0")


def _finish(table: CsvTable, out: pd.DataFrame) -> CsvTable:
    return replace(table, rows=out.fillna("").astype(str))
