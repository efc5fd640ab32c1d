"""`python -m ray_cxr.cli`, as `ray-cxr`."""

from ray_cxr import environment
from ray_cxr.cli import main

environment.configure_command()
raise SystemExit(main())
