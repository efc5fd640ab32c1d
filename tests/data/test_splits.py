"""Splits are by patient, whatever the table's order, and a leak is named."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data import splits
from ray_cxr.errors import ConfigError, LeakError, TableError

FRACTIONS = (0.7, 0.1, 0.2)


def people(count: int, images: int = 3) -> pd.Series:
    return pd.Series([str(i) for i in range(count) for _ in range(images)], dtype=object)


def by_patient(patients: pd.Series, chosen: pd.Series) -> dict[str, set[str]]:
    return {str(name): set(group) for name, group in chosen.groupby(patients)}


def test_golden() -> None:
    """The assignment of these ten is for ever: a change of it would shift everybody's test set."""
    chosen = splits.patient_split(people(10, images=1), FRACTIONS, seed=0)
    assert chosen.tolist() == [
        "train",
        "train",
        "val",
        "train",
        "test",
        "train",
        "test",
        "train",
        "train",
        "train",
    ]


def test_shares_are_of_patients_not_of_images() -> None:
    patients = pd.Series(["big"] * 500 + [str(i) for i in range(99)], dtype=object)
    chosen = splits.patient_split(patients, FRACTIONS, seed=3)
    assert chosen.groupby(patients).first().value_counts().to_dict() == {"train": 70, "test": 20, "val": 10}


def test_all_images_of_a_patient_go_together() -> None:
    patients = people(40)
    assert all(len(names) == 1 for names in by_patient(patients, splits.patient_split(patients, FRACTIONS, 0)).values())


def test_seed_and_nothing_else_changes_the_split() -> None:
    patients = people(40)
    one = splits.patient_split(patients, FRACTIONS, 0)
    assert one.equals(splits.patient_split(patients, FRACTIONS, 0))
    assert not one.equals(splits.patient_split(patients, FRACTIONS, 1))


@pytest.mark.parametrize(
    "fractions",
    [
        (0.7, 0.3),
        (0.7, 0.1, 0.1, 0.1),
        (0.7, 0.1, 0.3),
        (0.6, 0.1, 0.2),
        (1.2, -0.1, -0.1),
        (70, 10, 20),
        (float("nan"), 0.5, 0.5),
        (float("nan"),) * 3,
        (float("inf"), 0.0, 0.0),
    ],
)
def test_bad_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^--fractions .*: give three numbers for train,val,test that sum to 1$"):
        splits.patient_split(people(5), fractions, 0)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--seed -1: give a whole number from 0 on$"):
        splits.patient_split(people(5), FRACTIONS, -1)


def test_unknown_patients_are_refused_and_counted() -> None:
    patients = pd.Series(["1", None, "2", None], dtype=object)
    with pytest.raises(TableError, match="needs patient ids, and 2 rows have none"):
        splits.patient_split(patients, FRACTIONS, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=60),
    st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)).filter(any),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_any_table_splits_disjoint_by_patient_in_any_order(
    patients: list[str], parts: tuple[int, int, int], seed: int, random: object
) -> None:
    fractions = [part / sum(parts) for part in parts]
    series = pd.Series(patients, dtype=object)
    chosen = splits.patient_split(series, fractions, seed)
    assert list(chosen.index) == list(series.index)
    of_patient = by_patient(series, chosen)
    assert all(len(names) == 1 for names in of_patient.values())
    assert splits.shared_patients(series, chosen) == {}
    # The shares are right to one patient each, and nobody goes where nobody should.
    for name, fraction in zip(("train", "val", "test"), fractions, strict=True):
        count = sum(names == {name} for names in of_patient.values())
        assert abs(count - fraction * len(of_patient)) <= 1.0 + 1e-9
        assert count == 0 or fraction > 0
    # More rows of the same patients, in another order, change nobody's split.
    shuffled = patients + patients[:5]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = splits.patient_split(pd.Series(shuffled, dtype=object), fractions, seed)
    assert by_patient(pd.Series(shuffled, dtype=object), again) == of_patient


def official(patients: list[str | None], train_val: set[str], test: set[str], seed: int = 0) -> pd.Series:
    ids = pd.Series([f"{i}.png" for i in range(len(patients))], dtype=object)
    return splits.official_split(ids, pd.Series(patients, dtype=object), frozenset(train_val), frozenset(test), seed)


def test_official_keeps_both_lists_and_takes_a_tenth_of_the_patients_as_val() -> None:
    patients: list[str | None] = [str(i // 2) for i in range(100)]
    chosen = official(patients, {f"{i}.png" for i in range(80)}, {f"{i}.png" for i in range(80, 98)})
    assert set(chosen[80:98]) == {"test"}
    assert chosen[98:].tolist() == [None, None]
    assert set(chosen[:80]) == {"train", "val"}
    names = by_patient(pd.Series(patients[:80], dtype=object), chosen[:80])
    assert sum(one == {"val"} for one in names.values()) == 4
    assert all(len(one) == 1 for one in names.values())
    seeded = official(patients, {f"{i}.png" for i in range(80)}, {f"{i}.png" for i in range(80, 98)}, seed=1)
    assert seeded[80:98].equals(chosen[80:98])
    assert not seeded.equals(chosen)


def test_official_refuses_an_image_in_both_lists() -> None:
    with pytest.raises(TableError, match=r"^2 images stand in both lists, such as '1\.png'; mend the lists$"):
        official(["a", "b", "c"], {"0.png", "1.png", "2.png"}, {"1.png", "2.png"})


def test_official_refuses_train_val_images_without_patient() -> None:
    with pytest.raises(TableError, match=r"^1 images of the train\+val list have no patient id"):
        official([None, "b", None], {"0.png", "1.png"}, {"2.png"})


def test_shared_patients_are_told_with_their_splits() -> None:
    patients = pd.Series(["a", "a", "b", "b", "c", None, None, "d", "d", "d"], dtype=object)
    chosen = pd.Series(["train", "test", "val", "val", "val", "train", "test", "train", None, "val"], dtype=object)
    assert splits.shared_patients(patients, chosen) == {"a": ("test", "train"), "d": ("val", "train")}


def test_leak_is_refused_with_count_and_names() -> None:
    patients = pd.Series(["a", "a", "b", "c", "c"], dtype=object)
    chosen = pd.Series(["train", "test", "train", "val", "train"], dtype=object)
    with pytest.raises(LeakError) as caught:
        splits.resolve_leaks(patients, chosen, "error")
    assert str(caught.value) == (
        "2 patients stand in more than one split: a (test+train), c (val+train); "
        "mend the tables, or use --on-leak drop to keep each in the most protected split"
    )


def test_long_leak_names_twenty_and_counts_the_rest() -> None:
    patients = pd.Series([f"{i:04d}" for i in range(1500)] * 2, dtype=object)
    chosen = pd.Series(["train"] * 1500 + ["test"] * 1500, dtype=object)
    with pytest.raises(LeakError) as caught:
        splits.resolve_leaks(patients, chosen, "error")
    text = str(caught.value)
    assert text.startswith("1,500 patients stand in more than one split: 0000 (test+train), ")
    assert text.count("(test+train)") == 20
    assert " and 1,480 more; " in text


def test_drop_keeps_the_most_protected_split() -> None:
    patients = pd.Series(["a", "a", "a", "b", "b", "c", None, "a"], dtype=object)
    chosen = pd.Series(["train", "val", "test", "train", "val", "train", "train", None], dtype=object)
    keep = splits.resolve_leaks(patients, chosen, "drop")
    assert keep.tolist() == [False, False, True, False, True, True, True, True]
    assert splits.shared_patients(patients[keep], chosen[keep]) == {}


@pytest.mark.parametrize("on_leak", ["error", "drop"])
def test_without_a_leak_all_is_kept(on_leak: str) -> None:
    patients = pd.Series(["a", "b", None], dtype=object)
    for chosen in (["train", "test", "train"], [None, None, None]):
        assert splits.resolve_leaks(patients, pd.Series(chosen, dtype=object), on_leak).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from(["train", "val", "test", None])), min_size=1
    )
)
def test_drop_always_ends_the_leak_and_loses_nobody(rows: list[tuple[str | None, str | None]]) -> None:
    patients, chosen = (pd.Series(list(column), dtype=object) for column in zip(*rows, strict=True))
    keep = splits.resolve_leaks(patients, chosen, "drop")
    assert splits.shared_patients(patients[keep], chosen[keep]) == {}
    assert set(patients[keep].dropna()) == set(patients.dropna())
    assert keep[chosen == "test"].all()
