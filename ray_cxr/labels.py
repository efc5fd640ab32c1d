"""The findings of ChestX-ray14: order, spellings, and conversion between text and numbers.

Source: Wang et al., ChestX-ray8, CVPR 2017, in its 14-finding release.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np

from ray_cxr.errors import ConfigError, TableError

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
NO_FINDING = "No_Finding"
#: The label columns of a manifest, in order.
LABELS: tuple[str, ...] = (*FINDINGS, NO_FINDING)

#: Columns p_spread_<Finding> of a score table: standard deviation of the probabilities that were averaged.
SPREAD_PREFIX = "p_spread_"

_SYNONYMS: dict[str, str] = {
    **{label: label for label in LABELS},
    "Infiltrate": "Infiltration",
    "Pleural Thickening": "Pleural_Thickening",
    "No Finding": NO_FINDING,
}


def canonicalize(token: str) -> str | None:
    """Return the label that `token` spells, or None; surrounding blanks are ignored, case is not."""
    return _SYNONYMS.get(token.strip())


def parse(text: str, *, where: str = "") -> tuple[str, ...]:
    """Split `A|B`, as in NIH's column `Finding Labels`, into canonical labels in `LABELS` order.

    An error starts with `where`, such as `row 17 (00000001_000.png)`.
    """
    at = f"{where}: " if where else ""
    names: set[str] = set()
    # A bar at the end adds no finding; text of bars alone is none either.
    for token in [token for token in text.split("|") if token.strip()] or [text]:
        label = canonicalize(token)
        if label is None:
            raise TableError(f"{at}unknown finding {token.strip()!r}{suggest(token.strip(), _SYNONYMS)}")
        names.add(label)
    if NO_FINDING in names and len(names) > 1:
        raise TableError(f"{at}'No Finding' together with a finding in {text!r}; remove one of them")
    return tuple(label for label in LABELS if label in names)


def encode(labels: Iterable[str]) -> np.ndarray:
    """Return canonical labels as uint8[15] in `LABELS` order: 1 for each label, else 0."""
    row = np.zeros(len(LABELS), dtype=np.uint8)
    for label in labels:
        row[LABELS.index(label)] = 1
    return row


def resolve(findings: int | Sequence[str]) -> tuple[str, ...]:
    """Return the findings of a setting (14, 15 or a list of names) in `LABELS` order."""
    if findings == 14:
        return FINDINGS
    if findings == 15:
        return LABELS
    if isinstance(findings, str) or not isinstance(findings, Sequence):
        raise ConfigError(f"findings: {findings!r} is neither 14, 15 nor a list of names")
    names = parse_order(findings)
    return tuple(label for label in LABELS if label in names)


def parse_order(names: Sequence[str]) -> tuple[str, ...]:
    """Return canonical names in the given order, such as the outputs of a third-party model."""
    result: list[str] = []
    for name in names:
        label = canonicalize(str(name))
        if label is None:
            raise ConfigError(f"findings: unknown finding {name!r}{suggest(str(name), _SYNONYMS)}")
        if label in result:
            raise ConfigError(f"findings: {label!r} occurs twice")
        result.append(label)
    if not result:
        raise ConfigError("findings: the list is empty; name at least one finding")
    return tuple(result)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` with the nearest known word in any case, or an empty string."""
    lower, names = word.lower(), {name.lower(): name for name in known}
    near = [name for name in names if name == lower or (len(lower) > 3 and name.startswith(lower))]
    near = sorted(near, key=len) or difflib.get_close_matches(lower, list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
