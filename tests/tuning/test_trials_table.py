"""The table of trials on the terminal."""

from __future__ import annotations

import pandas as pd
import pytest

from ray_cxr.cli.trials import print_trials

SETTINGS = {"learning_rate": 6.431e-4, "optimizer": "adam", "weight_decay": 1e-5, "dropout": 0.25, "dense": [512, 128]}
SETTINGS |= {"rotation": 7.5, "class_weights": "balanced", "label_smoothing": 0.01}


def rows(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "number": number,
            "state": "running" if number == 0 else "finished",
            "backbone": "EfficientNetV2B0",
            "epochs": 12,
            "val_auroc": None if number == 0 else 0.6 + number / 1000,
            "seconds": 12_345.6,
            **{f"param_{name}": value for name, value in SETTINGS.items()},
            "param_momentum": None,
        }
        for number in range(count)
    )


@pytest.mark.parametrize("width", [60, 80, 300])
def test_table_of_trials_has_the_searched_values_and_fits(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_trials(rows(4))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for name in ("EfficientNetV2B0", "0.6030", "12,346", "0.0006431", "[512, 128]", "balanced", *SETTINGS):
        assert name in shown
    assert "momentum" not in shown, "no trial has it"
    assert shown.count("waiting") == 1
    assert shown.count("learning_rate") == 1


def test_long_search_shows_its_best_trials(capsys: pytest.CaptureFixture[str]) -> None:
    print_trials(rows(40))
    shown = capsys.readouterr().out
    assert "0.6390" in shown
    assert "0.6010" not in shown
