"""cluster.yaml passes Ray's own validation, and says what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


def cluster() -> dict[str, object]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_it() -> None:
    validate_config(prepare_config(cluster()))


def test_ray_knows_every_key() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert schema["additionalProperties"] is False
    jsonschema.validate(cluster(), schema)


def test_the_head_neither_decodes_nor_trains_and_its_dashboard_is_not_open() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    kinds = cluster()["available_node_types"]
    assert kinds[cluster()["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--dashboard-host=127.0.0.1" in text
    assert "0.0.0.0" not in text
