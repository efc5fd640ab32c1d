"""benchmarks/scaling.py: its model of a cluster, the tables of docs/scaling.md, and the run with a stub model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    """The script as a module; it imports one next to it."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import scaling

        yield scaling
    finally:
        sys.path.remove(str(SCRIPT.parent))


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, encoding="utf-8", cwd=ROOT)


def test_a_prediction_worked_out_by_hand(scaling: ModuleType) -> None:
    """10,000 images, 2 nodes of 5 cores at 10 images per second, files of 100 rows."""
    costs = {"start_s": 7, "plan_row_s": 0.001, "count_file_s": 0.1, "driver_range_s": 0.01, "ready_s": 60}
    sizes = {"driver_bytes": 1000, "driver_row_bytes": 2, "driver_range_bytes": 30, "image_bytes": 1000}
    figures = scaling.Figures(
        rate=10, cores=5, rows_per_file=100, cpus_per_actor=4, price=36.0, head_price=3.6, **costs, **sizes
    )
    found = scaling.predict(10_000, 2, figures)
    parts = {"ready": 60, "start": 7, "plan": 10, "work": 100, "last files": 5, "count": 10}
    assert found.parts == pytest.approx(parts)
    assert found.limit == "workers"
    assert found.seconds == pytest.approx(192)
    assert found.node_hours == pytest.approx(2 * 192 / 3600)
    assert found.cost == pytest.approx(192 * 2 * 0.01 + 192 * 0.001)
    assert found.needed == pytest.approx(100_000)
    assert found.driver_bytes == 1000 + 20_000 + 3000
    # Storage of 50 kB/s is half as fast as the workers, and a driver that needs 3 s per file a third.
    slow = scaling.predict(10_000, 2, dataclasses.replace(figures, storage=50_000))
    assert (slow.limit, slow.parts["work"], slow.needed) == ("storage", pytest.approx(200), pytest.approx(50_000))
    slow = scaling.predict(10_000, 2, dataclasses.replace(figures, driver_range_s=3))
    assert (slow.limit, slow.parts["work"]) == ("driver", pytest.approx(300))


@given(st.integers(100_000, 10**9), st.integers(1, 10_000))
@settings(max_examples=50)
def test_more_images_take_longer_and_more_nodes_do_not(scaling: ModuleType, count: int, nodes: int) -> None:
    figures = scaling.Figures(storage=2e9)
    one = scaling.predict(count, nodes, figures)
    assert scaling.predict(2 * count, nodes, figures).seconds > one.seconds
    assert scaling.predict(count, 2 * nodes, figures).seconds <= one.seconds
    assert scaling.predict(count, 2 * nodes, figures).node_hours >= one.node_hours * (1 - 1e-9)
    assert scaling.predict(count, nodes, dataclasses.replace(figures, storage=1e9)).seconds >= one.seconds
    assert one.cost is None, "there is no default price"
    saturation = scaling.saturation(count, figures)
    first = int(min(saturation["nodes_that_storage_feeds"], saturation["nodes_that_the_driver_feeds"]))
    assert scaling.predict(count, first, figures).limit == "workers"
    assert scaling.predict(count, first + 2, figures).limit != "workers"


def test_the_page_has_the_tables_and_options_of_the_script(scaling: ModuleType) -> None:
    page = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    lines = [line for line in run_script().stdout.splitlines() if line]
    assert len(lines) > 10
    assert [line for line in lines if line not in page] == []
    options = [f"`--{figure.name.replace('_', '-')}`" for figure in dataclasses.fields(scaling.Figures)]
    assert [option for option in options if option not in page] == []


def test_wrong_arguments_are_refused(scaling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in ((["--rows", "5"], "--work"), (["--rows", "0", "--work", "x"], "--rows")):
        with pytest.raises(SystemExit) as stop:
            scaling.parse(arguments)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="it finds its processes in /proc")
def test_the_run_with_a_stub_model_scores_every_row_once(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = run_script("--work", tmp_path / "work", "--rows", 700, "--set", "rows_per_file=64", "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))["run"]
    assert (found["checks"].pop("rows"), found["checks"].pop("files"), found["checks"].pop("success")) == (
        700,
        11,
        True,
    )
    assert found["checks"] == {"doubled": 0, "missing": 0, "unknown": 0, "errors": 0}
    assert 0 < found["driver_peak_bytes"] < found["all_peak_bytes"]
    assert found["cpu_s"]["driver"] > 0
