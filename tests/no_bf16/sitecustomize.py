"""Imitate a CPU without bfloat16 in every Python process that has this folder on its path.

conftest.py puts it there, for Ray's workers too, where RAY_CXR_TEST_NO_BF16 is set.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "ray_cxr.models.runtime"


class WithoutBf16:
    """Finder that patches one module after its own code has run."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            module.cpu_has_bf16 = lambda: False  # type: ignore[attr-defined]

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, WithoutBf16())  # type: ignore[arg-type]
