"""The findings of ChestX-ray14: their one order, their spellings, and how label text becomes numbers.

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

_SYNONYMS: dict[str, str] = {
    **{label: label for label in LABELS},
    "Infiltrate": "Infiltration",
    "Pleural Thickening": "Pleural_Thickening",
    "No Finding": NO_FINDING,
}


def canonical(token: str) -> str | None:
    """The label that `token` spells (surrounding blanks ignored), or None; case matters."""
    return _SYNONYMS.get(token.strip())


def parse(text: str, *, where: str = "") -> tuple[str, ...]:
    """Split `A|B` into canonical labels, in `LABELS` order.

    Args:
        text: labels separated by `|`, as in NIH's column `Finding Labels`. Tokens are matched whole.
        where: the place to name in an error, such as `row 17 (00000001_000.png)`.

    Raises:
        TableError: an unknown token, no token at all, or No Finding together with a finding.
    """
    at = f"{where}: " if where else ""
    found: set[str] = set()
    for token in text.split("|"):
        label = canonical(token)
        if label is None:
            raise TableError(f"{at}unknown finding {token.strip()!r}{suggestion(token.strip(), _SYNONYMS)}")
        found.add(label)
    if NO_FINDING in found and len(found) > 1:
        raise TableError(f"{at}'No Finding' together with a finding in {text!r}; remove one of them")
    return tuple(label for label in LABELS if label in found)


def encode(labels: Iterable[str]) -> np.ndarray:
    """Canonical labels as uint8[15] in `LABELS` order: 1 where named, 0 elsewhere.

    Raises:
        ValueError: a name that is not in `LABELS`.
    """
    row = np.zeros(len(LABELS), dtype=np.uint8)
    for label in labels:
        row[LABELS.index(label)] = 1
    return row


def decode(row: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """The inverse of `encode`: the names whose entry is 1."""
    return tuple(label for label, value in zip(LABELS, row, strict=True) if value == 1)


def resolve(findings: int | str | Sequence[str]) -> tuple[str, ...]:
    """The setting `findings` (14, 15 or a list of names) as canonical names, in `LABELS` order.

    Raises:
        ConfigError: another number, an unknown name, or a name given twice.
    """
    if findings in (14, "14"):
        return FINDINGS
    if findings in (15, "15"):
        return LABELS
    if isinstance(findings, str) or not isinstance(findings, Sequence):
        raise ConfigError(f"findings: {findings!r} is neither 14, 15 nor a list of names")
    names = ordered(findings)
    return tuple(label for label in LABELS if label in names)


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Names in the order given, each made canonical: the order of somebody's model outputs.

    Raises:
        ConfigError: an unknown name, a name given twice, or no name.
    """
    result: list[str] = []
    for name in names:
        label = canonical(str(name))
        if label is None:
            raise ConfigError(f"findings: unknown finding {name!r}{suggestion(str(name), _SYNONYMS)}")
        if label in result:
            raise ConfigError(f"findings: {label!r} is named twice")
        result.append(label)
    if not result:
        raise ConfigError("findings: the list is empty; name at least one finding")
    return tuple(result)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
