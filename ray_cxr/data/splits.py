"""Train, validation and test: always by patient, never by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ray_cxr.errors import ConfigError, LeakError, TableError

#: From the most to the least protected: where a patient of two splits stays under `--on-leak drop`.
PROTECTION: tuple[str, ...] = ("test", "val", "train")

#: The share of train_val's patients that the official split gives to validation.
OFFICIAL_VAL_FRACTION = 0.1


def patient_split(patients: pd.Series, fractions: Sequence[float], seed: int) -> pd.Series:
    """Assign every image to train, val or test by its patient.

    Args:
        patients: patient id per image, strings, no nulls.
        fractions: shares of the patients for train, val and test; they sum to 1.
        seed: the assignment is a pure function of the set of patients, the fractions and this.

    Returns:
        Strings, aligned with `patients`.

    Raises:
        ConfigError: fractions that are not three non-negative numbers of sum 1, or a negative seed.
        TableError: an image without a patient id.
    """
    # Asked so that NaN fails it too.
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1.0) <= 1e-6:
        shown = ",".join(f"{value:g}" for value in fractions)
        raise ConfigError(f"--fractions {shown}: give three numbers for train,val,test that sum to 1")
    unknown = int(patients.isna().sum())
    if unknown:
        raise TableError(f"a split by patient needs patient ids, and {unknown:,} rows have none; add a patient column")
    train, val, _ = _cut(patients, fractions, seed)
    return pd.Series(
        np.where(patients.isin(train), "train", np.where(patients.isin(val), "val", "test")),
        index=patients.index,
        dtype="object",
    )


def official_split(
    image_ids: pd.Series, patients: pd.Series, train_val: frozenset[str], test: frozenset[str], seed: int
) -> pd.Series:
    """NIH's two lists; val is a tenth of train_val's patients, seeded. Images in neither list get None.

    Raises:
        TableError: an image stands in both lists, or an image of train_val has no patient id.
    """
    both = train_val & test
    if both:
        raise TableError(f"{len(both):,} images stand in both lists, such as {min(both)!r}; mend the lists")
    in_train_val = image_ids.isin(train_val)
    unknown = int(patients[in_train_val].isna().sum())
    if unknown:
        raise TableError(f"{unknown:,} images of the train+val list have no patient id; add a patient column")
    fractions = (1.0 - OFFICIAL_VAL_FRACTION, OFFICIAL_VAL_FRACTION, 0.0)
    _, val, _ = _cut(patients[in_train_val], fractions, seed)
    result = pd.Series([None] * len(image_ids), index=image_ids.index, dtype="object")
    result[in_train_val] = "train"
    result[in_train_val & patients.isin(val)] = "val"
    result[image_ids.isin(test)] = "test"
    return result


def shared_patients(patients: pd.Series, splits: pd.Series) -> dict[str, tuple[str, ...]]:
    """Patients that stand in more than one split, with those splits in `PROTECTION` order."""
    known = pd.DataFrame({"patient": patients, "split": splits}).dropna().drop_duplicates()
    crowded = known[known.duplicated("patient", keep=False)]
    return {
        str(patient): tuple(name for name in PROTECTION if name in set(group))
        for patient, group in sorted(crowded.groupby("patient")["split"])
    }


def resolve_leaks(patients: pd.Series, splits: pd.Series, on_leak: str) -> pd.Series:
    """Which images to keep so that no patient stands in two splits: bool, aligned with `patients`.

    Args:
        on_leak: `error` refuses; `drop` keeps a patient in the most protected of their splits.

    Raises:
        LeakError: with `error`, when a patient stands in two splits; says how many and which.
    """
    shared = shared_patients(patients, splits)
    if not shared:
        return pd.Series(True, index=patients.index)
    if on_leak == "error":
        shown = ", ".join(f"{patient} ({'+'.join(names)})" for patient, names in list(shared.items())[:20])
        more = f" and {len(shared) - 20:,} more" if len(shared) > 20 else ""
        raise LeakError(
            f"{len(shared):,} patients stand in more than one split: {shown}{more}; "
            "mend the tables, or use --on-leak drop to keep each in the most protected split"
        )
    home = patients.map({patient: names[0] for patient, names in shared.items()})
    return home.isna() | (home == splits) | splits.isna()


def _cut(
    patients: pd.Series, fractions: Sequence[float], seed: int
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    if seed < 0:
        raise ConfigError(f"--seed {seed}: give a whole number from 0 on")
    # Sorted first, so that the order of rows in a table does not matter.
    unique = np.array(sorted(set(patients)), dtype=object)
    order = np.random.default_rng(seed).permutation(len(unique))
    n_test = round(fractions[2] * len(unique))
    # A share of nothing is nobody, also where the other two shares were both rounded down.
    n_val = round(fractions[1] * len(unique)) if fractions[0] else len(unique) - n_test
    test, val, train = np.split(unique[order], [n_test, n_test + n_val])
    return frozenset(train), frozenset(val), frozenset(test)
