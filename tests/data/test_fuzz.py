"""Damaged files of every kind through one decoder process: each gives a picture or a code, and none ends it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.data.sandbox import Decoder, Failure
from ray_cxr.errors import ERROR_CODES

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_files import generated, mutated

#: What a file can be refused for by its contents alone.
CODES = set(ERROR_CODES) - {"missing", "permission", "storage", "decode_timeout", "decoder_crash"}


def test_every_seed_is_a_picture() -> None:
    with Decoder([InputSpec(size=64)]) as decoder:
        results = {seed.name: decoder.load(seed.data) for seed in generated()}
    assert [name for name, result in results.items() if isinstance(result, Failure)] == []


def test_every_damaged_file_is_a_picture_or_a_code() -> None:
    found: Counter[str] = Counter()
    with Decoder([InputSpec(size=64)], tags=True) as decoder:
        decoder.start()
        child = decoder._child
        for number in range(500):
            name, data = mutated(7, number, with_real=False)
            result = decoder.load(data)
            if isinstance(result, Failure):
                assert result.code in CODES, f"{name}: {result}"
                assert "\n" not in result.message
                assert "Doe" not in result.message
                found[result.code] += 1
            else:
                assert [(image.shape, image.dtype) for image in result.images] == [((64, 64), np.uint8)], name
                found["ok"] += 1
        assert decoder._child is child
    assert {"ok", "corrupt", "truncated", "not_an_image"} <= set(found)
