"""Splits are by patient and independent of the table's order, and errors name a leak."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data import splits
from ray_cxr.errors import ConfigError, LeakError, TableError

FRACTIONS = (0.7, 0.1, 0.2)
SPLITS = ("train", "val", "test")


def series(values: list[str | None]) -> pd.Series:
    return pd.Series(values, dtype=object)


def by_patient(patients: pd.Series, chosen: pd.Series) -> dict[str, set[str]]:
    return {str(name): set(group) for name, group in chosen.groupby(patients)}


def test_assignment_never_changes_between_versions() -> None:
    """A change of the split would change the test set of all users."""
    patients = series([str(i) for i in range(10)])
    chosen = splits.patient_split(patients, FRACTIONS, seed=0)
    assert not chosen.equals(splits.patient_split(patients, FRACTIONS, seed=1))
    assert " ".join(chosen) == "train train val train test train test train train train"


def test_bad_fractions_seeds_and_unknown_patients_are_refused() -> None:
    for text in ("0.7,0.3", "0.7,0.1,0.1,0.1", "0.7,0.1,0.3", "0.6,0.1,0.2", "1.2,-0.1,-0.1", "nan,0.5,0.5", "inf,0,0"):
        with pytest.raises(ConfigError, match=rf"^--fractions {text}: "):
            splits.patient_split(series(["a", "b"]), [float(number) for number in text.split(",")], 0)
    with pytest.raises(ConfigError, match=r"^--seed -1: "):
        splits.patient_split(series(["a"]), FRACTIONS, -1)
    with pytest.raises(TableError, match="2 rows"):
        splits.patient_split(series(["1", None, "2", None]), FRACTIONS, 0)


@settings(max_examples=60)
@given(
    st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=60),
    st.tuples(*[st.integers(0, 10)] * 3).filter(any),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_any_table_splits_disjoint_by_patient_in_any_order(patients: list[str], parts, seed: int, random) -> None:
    fractions = [part / sum(parts) for part in parts]
    ids = series(patients)
    chosen = splits.patient_split(ids, fractions, seed)
    assert list(chosen.index) == list(ids.index)
    of_patient = by_patient(ids, chosen)
    assert all(len(names) == 1 for names in of_patient.values())
    assert splits.shared_patients(ids, chosen) == {}
    # The shares are right to one patient each; a share of zero stays empty.
    for name, fraction in zip(SPLITS, fractions, strict=True):
        count = sum(names == {name} for names in of_patient.values())
        assert abs(count - fraction * len(of_patient)) <= 1.0 + 1e-9
        assert count == 0 or fraction > 0
    # More rows of the same patients, in another order, do not change any split.
    shuffled = patients + patients[:5]
    random.shuffle(shuffled)
    again = splits.patient_split(series(shuffled), fractions, seed)
    assert by_patient(series(shuffled), again) == of_patient


def official(patients: list[str | None], train_val: range, test: range, seed: int = 0) -> pd.Series:
    images = series([f"{i}.png" for i in range(len(patients))])
    lists = (frozenset(f"{i}.png" for i in numbers) for numbers in (train_val, test))
    return splits.official_split(images, series(patients), *lists, seed)


def test_official_split_keeps_both_lists_and_takes_a_tenth_of_the_patients_as_val() -> None:
    patients: list[str | None] = [str(i // 2) for i in range(100)]
    chosen = official(patients, range(80), range(80, 98))
    assert set(chosen[80:98]) == {"test"}
    assert chosen[98:].tolist() == [None, None]
    names = list(by_patient(series(patients[:80]), chosen[:80]).values())
    assert (names.count({"val"}), names.count({"train"})) == (4, 36)
    other = official(patients, range(80), range(80, 98), seed=1)
    assert other[80:98].equals(chosen[80:98])
    assert not other.equals(chosen)


def test_official_split_refuses_overlapping_lists_and_unknown_patients() -> None:
    with pytest.raises(TableError, match=r"^2 images .*'1\.png'"):
        official(["a", "b", "c"], range(3), range(1, 3))
    with pytest.raises(TableError, match=r"^1 images of the train\+val list"):
        official([None, "b", None], range(2), range(2, 3))


@pytest.mark.parametrize(("count", "more"), [(2, ""), (20, ""), (1500, " and 1,480 more")])
def test_leak_error_names_up_to_twenty_patients(count: int, more: str) -> None:
    patients = series([f"{i:04d}" for i in range(count)] * 2)
    with pytest.raises(LeakError) as caught:
        splits.resolve_leaks(patients, series(["train"] * count + ["test"] * count), "error")
    text = str(caught.value)
    assert text.startswith(f"{count:,} patients")
    assert ": 0000 (test+train), 0001 (test+train)" in text
    assert text.count("(test+train)") == min(count, 20)
    assert f"{more}; " in text
    assert ("more;" in text) == bool(more)


def test_drop_keeps_the_most_protected_split() -> None:
    patients = series(["a", "a", "a", "b", "b", "c", None, "a"])
    chosen = series(["train", "val", "test", "train", "val", "train", "train", None])
    assert splits.shared_patients(patients, chosen) == {"a": ("test", "val", "train"), "b": ("val", "train")}
    keep = splits.resolve_leaks(patients, chosen, "drop")
    assert keep.tolist() == [False, False, True, False, True, True, True, True]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([*SPLITS, None])), min_size=1))
def test_drop_resolves_every_leak_and_loses_no_patient(rows: list[tuple[str | None, str | None]]) -> None:
    patients, chosen = (series(list(column)) for column in zip(*rows, strict=True))
    keep = splits.resolve_leaks(patients, chosen, "drop")
    assert splits.shared_patients(patients[keep], chosen[keep]) == {}
    assert set(patients[keep].dropna()) == set(patients.dropna())
    assert keep[chosen == "test"].all()
    for on_leak in ("error", "drop"):
        assert splits.resolve_leaks(patients[keep], chosen[keep], on_leak).all()
