"""Labels: one order, exact tokens, and errors that name the place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr import labels
from ray_cxr.errors import ConfigError, TableError

TEXT = "Atelectasis|Cardiomegaly|Consolidation|Edema|Effusion|Emphysema|Fibrosis|Hernia|Infiltration|Mass|Nodule|"
FOURTEEN = tuple(f"{TEXT}Pleural_Thickening|Pneumonia|Pneumothorax".split("|"))

LABEL_SETS = st.sets(st.sampled_from(FOURTEEN)).map(lambda names: tuple(sorted(names)) or ("No_Finding",))


def test_tokens_are_parsed() -> None:
    assert labels.parse(" Mass | Effusion | Mass") == ("Effusion", "Mass")
    assert labels.parse("Mass|") == labels.parse("|Mass||") == ("Mass",)
    assert labels.parse("Infiltrate|Infiltration") == ("Infiltration",)
    canonical = {"Infiltrate": "Infiltration", " Edema ": "Edema", "edema": None, "": None}
    assert {token: labels.canonicalize(token) for token in canonical} == canonical


@pytest.mark.parametrize("text", ["Masses", "mass", "Pneumo", "Mass;Nodule", "|", "", "  "])
def test_unknown_tokens_are_refused_by_place(text: str) -> None:
    with pytest.raises(TableError, match="unknown finding"):
        labels.parse(text)
    with pytest.raises(TableError, match=r"^row 17 \(1\.png\): unknown finding 'Pnuemonia'.*'Pneumonia'"):
        labels.parse("Effusion|Pnuemonia", where="row 17 (1.png)")
    with pytest.raises(TableError, match=r"^line 3: 'No Finding' .*'Mass\|No Finding'"):
        labels.parse("Mass|No Finding", where="line 3")


def test_order_and_encoding() -> None:
    assert labels.FINDINGS == FOURTEEN
    assert list(labels.LABELS) == [*FOURTEEN, "No_Finding"]
    row = labels.encode(["Mass", "Atelectasis"])
    assert row.dtype == np.uint8
    assert row.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert labels.encode(["No_Finding"]).tolist() == [0] * 14 + [1]
    with pytest.raises(ValueError, match="not in tuple"):
        labels.encode(["Infiltrate"])


@settings(max_examples=50)
@given(LABEL_SETS, st.randoms(use_true_random=False))
def test_encode_parse_round_trip(names: tuple[str, ...], random: object) -> None:
    assert tuple(name for name, value in zip(labels.LABELS, labels.encode(names), strict=True) if value) == names
    shuffled = list(names)
    random.shuffle(shuffled)
    assert labels.parse("|".join(shuffled)) == names
    assert labels.parse("|".join(name.replace("_", " ") for name in shuffled)) == names


def test_resolve() -> None:
    assert labels.resolve(14) == FOURTEEN
    assert labels.resolve(15) == (*FOURTEEN, "No_Finding")
    assert labels.resolve(("No Finding", "Infiltrate")) == ("Infiltration", "No_Finding")
    assert labels.parse_order(["Pneumonia", "Infiltrate", "Mass"]) == ("Pneumonia", "Infiltration", "Mass"), "as given"


def test_resolve_refuses() -> None:
    for setting, message in (
        *((setting, f"{setting!r} is neither") for setting in (13, True, None, 1.5, "Mass")),
        (["Mas"], "'Mas'; did you mean 'Mass'"),
        (["Infiltration", "Infiltrate"], "'Infiltration'"),
        ([], "empty"),
        ([3], "unknown finding 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            labels.resolve(setting)
