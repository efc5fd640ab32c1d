import sys

sys.path.insert(0, "/work/main/tests/tuning")
import pytest
from test_search import *

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("i", range(6))
def test_loop(i, prepared, tmp_path):
    def act(number, epoch, noted):
        while number and not noted("0 epoch1"):
            time.sleep(0.02)

    plan = plan_of(prepared, tmp_path / "study", [0.5, 0.2, 0.3], scheduler="halving", reduction_factor=3, concurrent=1)
    done = searched(plan, fake(act))
    print("\n".join(done.said))
    print(notes(plan.out))
    print(done.outcome.interrupted)
    assert done.rows["state"].tolist() == ["finished", "stopped", "stopped"]
