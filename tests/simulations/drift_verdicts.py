"""Simulate verdicts on drift: false `ok` at the edge of tolerance, and verdicts without any drift.

`python tests/simulations/drift_verdicts.py [ROUNDS]` prints two tables, and fails if more than 6.5% of shares or
scores are `ok` at the edge of the tolerated range, or more than 6.5% differ without drift (with fewer than 1,000
rounds: two standard errors more).

Images of a patient share a normal factor. At the edge, shares differ from the expected one by a quarter, by one
percentage point or by a factor of two, and scores are shifted up, or away from the middle, until the population
stability index is 0.1. The second table gives the `ok` among 14 independent findings without drift.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from ray_cxr.evaluation import drift

HIGHEST = 0.065
#: Patients, images of each (None: geometric with mean 5), correlation of images of a patient, patients of the baseline.
SETS: tuple[tuple[int, int | None, float, int], ...] = (
    (2000, 1, 0.0, 3000),
    (5000, 1, 0.0, 5000),
    (1000, 5, 0.7, 1600),
    (1000, 5, 0.9, 1600),
    (2000, 5, 0.9, 2000),
    (500, None, 0.9, 800),
)
#: Expected shares, and true shares at the edge.
SHARES = ((0.3, 0.375), (0.1, 0.125), (0.9, 0.875), (0.03, 0.04), (0.008, 0.016))
GRID = np.linspace(0.0, 1.0, 1001)
#: Change of the density of scores on the grid, in any unit.
SHIFTS = {"upwards": GRID, "outwards": (2.0 * GRID - 1.0) ** 2}
UNCHANGED = ((100, 100), (1000, 1000), (20_000, 2000), (20_000, 20_000))
FINDINGS = 14


def draw(rng: np.random.Generator, patients: int, each: int | None, correlation: float) -> tuple[np.ndarray, ...]:
    """Draw uniform values and patients."""
    sizes = rng.geometric(0.2, patients) if each is None else np.full(patients, each)
    codes = np.repeat(np.arange(patients), sizes)
    common, own = rng.normal(size=patients)[codes], rng.normal(size=len(codes))
    return ndtr(np.sqrt(correlation) * common + np.sqrt(1.0 - correlation) * own), codes


def shift(values: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Give uniform values a density 1 + slope * tilt on `GRID`, so that their index is at the tolerated limit."""
    rise = np.concatenate([[0.0], np.cumsum((tilt[1:] + tilt[:-1]) / 2.0) * GRID[1]])
    rise -= rise[-1] * GRID
    change = np.diff(np.interp(np.arange(11) / 10.0, GRID, rise))
    steepest = -0.0999 / change.min()
    slope = brentq(lambda s: float((s * change * np.log1p(10 * s * change)).sum()) - drift.PSI_DIFFERS, 0.0, steepest)
    return np.interp(values, GRID + slope * rise, GRID)


def judge_shares(values: np.ndarray, codes: np.ndarray, base: np.ndarray, share: float, true: float) -> str:
    n = len(values)
    model = {"expected_flag_rates": {"A": float((base < share).mean())}, "operating_points": {"A": {"n": len(base)}}}
    return judge(model, (values < true).astype(np.int8), np.full(n, np.nan), codes).flags[0].verdict


def judge_scores(values: np.ndarray, codes: np.ndarray, base: np.ndarray) -> str:
    model = {"provenance": {"score_quantiles": {"A": drift.score_quantiles(base)}}}
    return judge(model, np.full(len(values), -1, np.int8), values, codes).scores[0].verdict


def judge(model: dict, flags: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> drift.Drift:
    n = len(codes)
    nothing, expected = np.full(n, None, object), drift.Expected.from_model(model)
    return drift.measure_drift(
        expected, ["A"], flags[:, None], scores[:, None], nothing, np.ones(n, bool), codes.astype(object)
    )


def simulate_set(rng: np.random.Generator, rounds: int, chosen: tuple) -> Iterator[tuple[str, list[str]]]:
    """Yield each comparison and its verdicts."""
    patients, each, correlation, before = chosen
    found: dict[str, list[str]] = {}
    for _ in range(rounds):
        base, _ = draw(rng, before, each, correlation)
        values, codes = draw(rng, patients, each, correlation)
        for share, true in SHARES:
            found.setdefault(f"share {share}", []).append(judge_shares(values, codes, base, share, true))
        for name, tilt in SHIFTS.items():
            found.setdefault(f"scores {name}", []).append(judge_scores(shift(values, tilt), codes, base))
        found.setdefault("same share", []).append(judge_shares(values, codes, base, 0.1, 0.1))
        found.setdefault("same scores", []).append(judge_scores(values, codes, base))
    yield from found.items()


def count_unchanged(rng: np.random.Generator, n: int, images: int, share: float, rounds: int) -> float:
    names, wanted = [str(j) for j in range(FINDINGS)], []
    points, nothing = {name: {"n": images} for name in names}, np.full(n, None, object)
    for _ in range(rounds):
        rates = dict(zip(names, (rng.binomial(images, share, FINDINGS) / images).tolist(), strict=True))
        expected = drift.Expected.from_model({"expected_flag_rates": rates, "operating_points": points})
        flags = (rng.random((n, FINDINGS)) < share).astype(np.int8)
        scores = np.full(flags.shape, np.nan)
        rows = drift.measure_drift(expected, names, flags, scores, nothing, np.ones(n, bool), nothing).flags
        wanted += [row.verdict == drift.OK for row in rows]
    return float(np.mean(wanted))


def main(rounds: int) -> int:
    rng = np.random.default_rng(20261130)
    highest, missed = HIGHEST + 2.0 * (0.05 * 0.95 / rounds) ** 0.5 * (rounds < 1000), []
    for chosen in SETS:
        patients, each, correlation, before = chosen
        print(f"{patients} patients, {each or 'about 5'} images each, correlation {correlation}; baseline {before}")
        for name, verdicts in simulate_set(rng, rounds, chosen):
            wrong = ("differs", "large") if name.startswith("same") else ("ok",)
            share = sum(verdict in wrong for verdict in verdicts) / rounds
            print(f"  {name:16} {'/'.join(wrong)} {100 * share:5.1f}%", flush=True)
            if share > highest:
                missed.append(f"{name}, {patients} patients, correlation {correlation}: {100 * share:.1f}%")
    print(f"ok among {FINDINGS} findings without drift")
    for n, images in UNCHANGED:
        shares = [count_unchanged(rng, n, images, share, max(1, min(20, rounds // 10))) for share in (0.01, 0.1, 0.3)]
        print(f"  {n:6} {images:6}", *(f"{100 * share:4.0f}%" for share in shares), flush=True)
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
