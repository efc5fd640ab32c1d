"""`ray job submit --working-dir . -- python jobs/score.py ...`: the arguments of `ray-cxr score`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_cxr.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["score", *sys.argv[1:]]))
