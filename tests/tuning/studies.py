"""Read a study as users see it: its files, and errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest


def get_refusal(error: type[Exception], function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of the error that a call raises, which must be one line."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def read_rows(out: Path) -> pd.DataFrame:
    return pq.read_table(out / "trials.parquet").to_pandas().set_index("number")


def load_study(out: Path) -> optuna.Study:
    storage = f"sqlite:///{out / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)
