"""How the frozen input of `score` is laid out, so that what a worker reads of it does not grow with it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.scoring.source import group_rows


@given(st.integers(0, 10**9), st.integers(1, 1_000_000))
def test_the_footer_of_the_frozen_input_does_not_grow_with_it(rows: int, rows_per_file: int) -> None:
    """Every task reads it; in groups of one size a hundred times the rows cost a hundred times as much each time."""
    group = group_rows(rows, rows_per_file)
    assert group % rows_per_file == 0, "a range never straddles two groups"
    assert group >= min(8192, max(rows, 1)), "small groups cost more than they spare"
    assert -(-rows // group) <= 1001
