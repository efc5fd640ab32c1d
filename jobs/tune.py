"""`ray job submit --working-dir . -- python jobs/tune.py ...`: the arguments of `ray-cxr tune`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_cxr.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["tune", *sys.argv[1:]]))
