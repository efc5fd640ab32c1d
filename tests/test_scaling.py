"""The model of docs/scaling.md obeys what must hold of it, its page is what it prints, and the stub's run runs."""

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
images = st.integers(1, 10**9)
nodes = st.integers(1, 10_000)


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    """The script as a module; beside it lies one that it imports."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import scaling

        yield scaling
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_by_hand(scaling: ModuleType) -> None:
    """Round figures, worked out on paper: 10,000 images, 2 nodes of 5 cores at 10 images/s, files of 100."""
    figures = scaling.Figures(
        rate=10, cores=5, start_s=7, plan_row_s=0.001, count_file_s=0.1, rows_per_file=100, cpus_per_actor=4,
        driver_range_s=0.01, driver_bytes=1000, driver_row_bytes=2, driver_range_bytes=30, image_bytes=1000, ready_s=60,
        price=36.0, head_price=3.6,
    )  # fmt: skip
    found = scaling.predict(10_000, 2, figures)
    assert found.parts == pytest.approx(
        {"ready": 60, "start": 7, "plan": 10, "work": 100, "last files": 5, "count": 10}
    )
    assert found.limit == "workers"
    assert found.seconds == pytest.approx(192)
    assert found.node_hours == pytest.approx(2 * 192 / 3600)
    assert found.cost == pytest.approx(192 * 2 * 0.01 + 192 * 0.001)
    assert found.needed == pytest.approx(100_000)
    assert found.driver_bytes == 1000 + 20_000 + 3000
    # A store that gives 50 kB/s is half as quick as these workers; a driver that needs 3 s a file, a third.
    slow = scaling.predict(10_000, 2, dataclasses.replace(figures, storage=50_000))
    assert (slow.limit, slow.parts["work"]) == ("storage", pytest.approx(200))
    assert slow.needed == pytest.approx(50_000)
    slow = scaling.predict(10_000, 2, dataclasses.replace(figures, driver_range_s=3))
    assert (slow.limit, slow.parts["work"]) == ("driver", pytest.approx(300))


@given(images, nodes)
@settings(deadline=None)
def test_more_images_take_longer_and_more_nodes_never_do(scaling: ModuleType, count: int, n: int) -> None:
    figures = scaling.Figures(storage=5e9)
    one = scaling.predict(count, n, figures)
    assert scaling.predict(2 * count, n, figures).seconds > one.seconds
    assert scaling.predict(count, 2 * n, figures).seconds <= one.seconds
    assert scaling.predict(count, 2 * n, figures).node_hours >= one.node_hours * (1 - 1e-9)
    assert scaling.predict(count, n, dataclasses.replace(figures, storage=1e9)).seconds >= one.seconds
    assert one.cost is None, "a price is the reader's to set"


@given(st.integers(100_000, 10**9))
@settings(deadline=None)
def test_what_saturates_is_where_the_limit_changes(scaling: ModuleType, count: int) -> None:
    figures = scaling.Figures(storage=2e9)
    at = scaling.saturation(count, figures)
    first = min(at["nodes_that_storage_feeds"], at["nodes_that_the_driver_feeds"])
    assert scaling.predict(count, int(first), figures).limit == "workers"
    assert scaling.predict(count, int(first) + 2, figures).limit != "workers"


def test_the_page_has_the_table_that_the_script_prints() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True, cwd=ROOT)
    page = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 2 + 12 + 3
    for line in lines:
        assert line in page


def test_the_pages_figures_are_the_models(scaling: ModuleType) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for one in dataclasses.fields(scaling.Figures):
        assert f"`--{one.name.replace('_', '-')}`" in page


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--rows", "5"], "--work"), (["--rows", "0", "--work", "x"], "below 1")]
)
def test_wrong_arguments_are_refused(arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_folder_is_listed(scaling: ModuleType, tmp_path: Path) -> None:
    assert scaling.listing(123, tmp_path)["files"] == 123


def test_the_stubs_pictures_are_no_errors(scaling: ModuleType, tmp_path: Path) -> None:
    from ray_cxr.config import InputSpec
    from ray_cxr.data import imaging

    paths = scaling.pictures(tmp_path / "pictures")
    assert len(set(paths)) == scaling.PICTURES
    for path in paths:
        assert imaging.load(path, InputSpec(size=scaling.STUB_SIZE)).shape == (scaling.STUB_SIZE,) * 2


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="it finds its processes in /proc")
def test_the_stubs_run(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--work",
            tmp_path / "work",
            "--rows",
            "700",
            "--set",
            "rows_per_file=64",
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["run"]
    assert found["checks"] == {
        "rows": 700, "doubled": 0, "missing": 0, "unknown": 0, "errors": 0, "success": True, "files": 11,
    }  # fmt: skip
    assert 50 * 2**20 < found["driver_peak_bytes"] < found["all_peak_bytes"]
    assert found["cpu_s"]["driver"] > 0
    assert "700 rows in" in done.stdout
