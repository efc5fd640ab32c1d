"""Split into train, validation and test by patient, never by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ray_cxr.errors import ConfigError, LeakError, TableError

#: From most to least protected: `--on-leak drop` keeps a patient in the first of these splits.
PROTECTION: tuple[str, ...] = ("test", "val", "train")

#: Fraction of train_val's patients that the official split assigns to val.
OFFICIAL_VAL_FRACTION = 0.1


def patient_split(patients: pd.Series, fractions: Sequence[float], seed: int) -> pd.Series:
    """Assign every image to train, val or test by its patient (an id per image, without nulls).

    `fractions` of the patients are for train, val and test. The result depends only on the set of patients, the
    fractions and the seed.
    """
    # `not <=` also refuses NaN.
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1.0) <= 1e-6:
        shown = ",".join(f"{value:g}" for value in fractions)
        raise ConfigError(f"--fractions {shown}: use three numbers for train,val,test that sum to 1")
    if unknown := int(patients.isna().sum()):
        raise TableError(f"--split patient: {unknown:,} rows have no patient id; add a patient column")
    train, val = _choose_patients(patients, fractions, seed)
    names = np.where(patients.isin(train), "train", np.where(patients.isin(val), "val", "test"))
    return pd.Series(names, index=patients.index, dtype="object")


def official_split(
    image_ids: pd.Series, patients: pd.Series, train_val: frozenset[str], test: frozenset[str], seed: int
) -> pd.Series:
    """Split by NIH's two lists; val is a seeded tenth of train_val's patients. Images in neither list get None."""
    if overlap := train_val & test:
        raise TableError(f"{len(overlap):,} images are in both lists, such as {min(overlap)!r}; remove them from one")
    in_train_val = image_ids.isin(train_val)
    if unknown := int(patients[in_train_val].isna().sum()):
        raise TableError(f"{unknown:,} images of the train+val list have no patient id; add a patient column")
    fractions = (1.0 - OFFICIAL_VAL_FRACTION, OFFICIAL_VAL_FRACTION, 0.0)
    _, val = _choose_patients(patients[in_train_val], fractions, seed)
    result = pd.Series([None] * len(image_ids), index=image_ids.index, dtype="object")
    result[in_train_val] = "train"
    result[in_train_val & patients.isin(val)] = "val"
    result[image_ids.isin(test)] = "test"
    return result


def shared_patients(patients: pd.Series, splits: pd.Series) -> dict[str, tuple[str, ...]]:
    """Return patients in more than one split, with those splits in `PROTECTION` order."""
    known = pd.DataFrame({"patient": patients, "split": splits}).dropna().drop_duplicates()
    shared = known[known.duplicated("patient", keep=False)]
    return {
        str(patient): tuple(name for name in PROTECTION if name in set(group))
        for patient, group in sorted(shared.groupby("patient")["split"])
    }


def resolve_leaks(patients: pd.Series, splits: pd.Series, on_leak: str) -> pd.Series:
    """Return the images to keep so that no patient is in two splits: bool, aligned with `patients`. With `on_leak`
    `error` a leak is refused; with `drop` a patient stays only in the most protected of their splits.
    """
    shared = shared_patients(patients, splits)
    if shared and on_leak == "error":
        shown = ", ".join(f"{patient} ({'+'.join(names)})" for patient, names in list(shared.items())[:20])
        more = f" and {len(shared) - 20:,} more" if len(shared) > 20 else ""
        raise LeakError(
            f"{len(shared):,} patients are in more than one split: {shown}{more}; "
            "correct the tables, or use --on-leak drop to keep each in the most protected split"
        )
    home = patients.map({patient: names[0] for patient, names in shared.items()})
    return home.isna() | (home == splits) | splits.isna()


def _choose_patients(patients: pd.Series, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Return the patients of train and of val; all others are for test."""
    if seed < 0:
        raise ConfigError(f"--seed {seed}: use 0 or a positive integer")
    # Sorted, so that the order of rows does not matter.
    unique = np.array(sorted(set(patients)), dtype=object)
    order = np.random.default_rng(seed).permutation(len(unique))
    n_test = round(fractions[2] * len(unique))
    # A fraction of 0 stays empty, also if both other fractions were rounded down.
    n_val = round(fractions[1] * len(unique)) if fractions[0] else len(unique) - n_test
    _, val, train = np.split(unique[order], [n_test, n_test + n_val])
    return [train, val]
