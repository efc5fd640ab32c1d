"""What a user reads where Ray does not start."""

from __future__ import annotations

import pytest
import ray

from ray_cxr import cli
from ray_cxr.config import RaySettings
from ray_cxr.errors import RayCxrError


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup. This could happen\nbecause the machine is slow."),
        ConnectionError("nobody\nthere"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RayCxrError) as caught, cli.start_ray(RaySettings()):
        pass
    said = str(caught.value)
    assert said.startswith("Ray at 'local': ")
    assert "\n" not in said
    assert ("run the command again" in said) == ("timed out" in str(error))
