"""Labels: one order, exact tokens, and errors that name the place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr import labels
from ray_cxr.errors import ConfigError, TableError

FOURTEEN = [
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
]

#: What `parse` can give: No Finding alone, or findings in order.
LABEL_SETS = st.one_of(
    st.just(("No_Finding",)),
    st.sets(st.sampled_from(FOURTEEN), min_size=1).map(lambda names: tuple(sorted(names))),
)


def test_order_is_the_contract() -> None:
    assert list(labels.FINDINGS) == FOURTEEN
    assert list(labels.LABELS) == [*FOURTEEN, "No_Finding"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mass", ("Mass",)),
        ("Effusion|Mass", ("Effusion", "Mass")),
        ("Mass|Effusion", ("Effusion", "Mass")),
        (" Mass | Effusion ", ("Effusion", "Mass")),
        ("Mass|Mass", ("Mass",)),
        ("No Finding", ("No_Finding",)),
        ("No_Finding", ("No_Finding",)),
        ("Infiltrate", ("Infiltration",)),
        ("Infiltrate|Infiltration", ("Infiltration",)),
        ("Pleural Thickening", ("Pleural_Thickening",)),
        ("Pleural_Thickening|Pneumothorax|Pneumonia", ("Pleural_Thickening", "Pneumonia", "Pneumothorax")),
    ],
)
def test_parse(text: str, expected: tuple[str, ...]) -> None:
    assert labels.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["Masses", "mass", "MASS", "Pneumo", "Pneumonias", "Mass;Nodule", "Mass,Nodule", "Mass|", "|", "", "  "]
)
def test_tokens_are_matched_whole(text: str) -> None:
    with pytest.raises(TableError, match="unknown finding"):
        labels.parse(text)


def test_unknown_token_is_named_with_place_and_suggestion() -> None:
    with pytest.raises(TableError) as caught:
        labels.parse("Effusion|Pnuemonia", where="row 17 (00000001_000.png)")
    assert str(caught.value) == "row 17 (00000001_000.png): unknown finding 'Pnuemonia'; did you mean 'Pneumonia'?"


def test_no_finding_stands_alone() -> None:
    with pytest.raises(TableError, match=r"^line 3: 'No Finding' stands together with a finding in 'Mass\|No Finding'"):
        labels.parse("Mass|No Finding", where="line 3")


@pytest.mark.parametrize(
    ("token", "label"), [("Infiltrate", "Infiltration"), (" Edema ", "Edema"), ("edema", None), ("", None)]
)
def test_canonical(token: str, label: str | None) -> None:
    assert labels.canonical(token) == label


def test_encode_literal() -> None:
    row = labels.encode(["Mass", "Atelectasis"])
    assert row.dtype == np.uint8
    assert row.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert labels.encode(["No_Finding"]).tolist() == [0] * 14 + [1]
    assert labels.encode([]).tolist() == [0] * 15


def test_encode_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        labels.encode(["Infiltrate"])


@settings(deadline=None)
@given(LABEL_SETS, st.randoms(use_true_random=False))
def test_encode_decode_parse_round_trip(names: tuple[str, ...], random: object) -> None:
    assert labels.decode(labels.encode(names)) == names
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert labels.parse("|".join(shuffled)) == names
    assert labels.parse("|".join(name.replace("_", " ") for name in shuffled)) == names


@settings(deadline=None)
@given(st.text())
def test_parse_gives_labels_or_table_error(text: str) -> None:
    try:
        parsed = labels.parse(text)
    except TableError:
        return
    assert parsed
    assert parsed == tuple(name for name in labels.LABELS if name in parsed)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (14, tuple(FOURTEEN)),
        ("14", tuple(FOURTEEN)),
        (15, (*FOURTEEN, "No_Finding")),
        ("15", (*FOURTEEN, "No_Finding")),
        (["Mass", "Edema"], ("Edema", "Mass")),
        (("No Finding", "Infiltrate"), ("Infiltration", "No_Finding")),
    ],
)
def test_resolve(setting: object, names: tuple[str, ...]) -> None:
    assert labels.resolve(setting) == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (13, "13 is neither 14, 15 nor a list"),
        (True, "True is neither"),
        (None, "None is neither"),
        (1.5, "1.5 is neither"),
        ("Mass", "'Mass' is neither"),
        (["Mas"], "unknown finding 'Mas'; did you mean 'Mass'"),
        (["Mass", "Mass"], "'Mass' is named twice"),
        (["Infiltration", "Infiltrate"], "'Infiltration' is named twice"),
        ([], "the list is empty"),
        ([3], "unknown finding 3"),
    ],
)
def test_resolve_refuses(setting: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels.resolve(setting)  # type: ignore[arg-type]


def test_ordered_keeps_the_order_given() -> None:
    assert labels.ordered(["Pneumonia", "Infiltrate", "Atelectasis"]) == ("Pneumonia", "Infiltration", "Atelectasis")


@pytest.mark.parametrize(("word", "text"), [("Efusion", "; did you mean 'Effusion'?"), ("zzz", "")])
def test_suggestion(word: str, text: str) -> None:
    assert labels.suggestion(word, labels.LABELS) == text
