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

#: What `parse` can return: No Finding alone, or findings in order.
LABEL_SETS = st.one_of(
    st.just(("No_Finding",)),
    st.sets(st.sampled_from(FOURTEEN), min_size=1).map(lambda names: tuple(sorted(names))),
)


def test_order_of_labels() -> None:
    assert list(labels.FINDINGS) == [*FOURTEEN]
    assert list(labels.LABELS) == [*FOURTEEN, "No_Finding"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Mass | Effusion ", ("Effusion", "Mass")),
        ("Mass|Mass", ("Mass",)),
        ("No Finding", ("No_Finding",)),
        ("Infiltrate|Infiltration", ("Infiltration",)),
        ("Pleural Thickening", ("Pleural_Thickening",)),
        ("Pleural_Thickening|Pneumothorax|Pneumonia", ("Pleural_Thickening", "Pneumonia", "Pneumothorax")),
    ],
)
def test_parse(text: str, expected: tuple[str, ...]) -> None:
    assert labels.parse(text) == expected


@pytest.mark.parametrize("text", ["Masses", "mass", "Pneumo", "Mass;Nodule", "Mass,Nodule", "Mass|", "|", "", "  "])
def test_tokens_are_matched_whole(text: str) -> None:
    with pytest.raises(TableError, match="unknown finding"):
        labels.parse(text)


def test_parse_errors_name_the_place() -> None:
    with pytest.raises(TableError, match=r"^row 17 \(1\.png\): unknown finding 'Pnuemonia'.*'Pneumonia'"):
        labels.parse("Effusion|Pnuemonia", where="row 17 (1.png)")
    with pytest.raises(TableError, match=r"^line 3: 'No Finding' .*'Mass\|No Finding'"):
        labels.parse("Mass|No Finding", where="line 3")


def test_canonical_and_suggestion() -> None:
    expected = {"Infiltrate": "Infiltration", " Edema ": "Edema", "edema": None, "": None}
    assert {token: labels.canonical(token) for token in expected} == expected
    assert labels.suggestion("Efusion", labels.LABELS) == "; did you mean 'Effusion'?"
    assert labels.suggestion("zzz", labels.LABELS) == ""


def test_encode() -> None:
    row = labels.encode(["Mass", "Atelectasis"])
    assert row.dtype == np.uint8
    assert row.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert labels.encode(["No_Finding"]).tolist() == [0] * 14 + [1]
    assert labels.encode([]).tolist() == [0] * 15
    with pytest.raises(ValueError, match="not in tuple"):
        labels.encode(["Infiltrate"])


@settings(max_examples=50)
@given(LABEL_SETS, st.randoms(use_true_random=False))
def test_encode_decode_parse_round_trip(names: tuple[str, ...], random: object) -> None:
    assert labels.decode(labels.encode(names)) == names
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert labels.parse("|".join(shuffled)) == names
    assert labels.parse("|".join(name.replace("_", " ") for name in shuffled)) == names


@given(st.text())
def test_parse_returns_labels_or_raises_table_error(text: str) -> None:
    try:
        parsed = labels.parse(text)
    except TableError:
        return
    assert parsed
    assert parsed == tuple(name for name in labels.LABELS if name in parsed)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        *((setting, FOURTEEN) for setting in (14, "14")),
        *((setting, (*FOURTEEN, "No_Finding")) for setting in (15, "15")),
        (["Mass", "Edema"], ("Edema", "Mass")),
        (("No Finding", "Infiltrate"), ("Infiltration", "No_Finding")),
    ],
)
def test_resolve(setting: object, names: tuple[str, ...]) -> None:
    assert labels.resolve(setting) == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *((setting, f"{setting!r} is neither") for setting in (13, True, None, 1.5, "Mass")),
        (["Mas"], "'Mas'; did you mean 'Mass'"),
        (["Mass", "Mass"], "'Mass' is named twice"),
        (["Infiltration", "Infiltrate"], "'Infiltration' is named twice"),
        ([], "empty"),
        ([3], "unknown finding 3"),
    ],
)
def test_resolve_refuses(setting: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels.resolve(setting)  # type: ignore[arg-type]


def test_ordered_keeps_the_given_order() -> None:
    assert labels.ordered(["Pneumonia", "Infiltrate", "Mass"]) == ("Pneumonia", "Infiltration", "Mass")
