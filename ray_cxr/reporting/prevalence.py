"""A file of prevalences: how common each finding is where a model shall be used."""

from __future__ import annotations

import tomllib

from ray_cxr.errors import InputError
from ray_cxr.labels import FINDINGS, canonical, suggestion


def read_prevalences(path: str) -> dict[str, float]:
    """Read a TOML file of `Finding = share` lines, shares between 0 and 1.

    Raises:
        InputError: no such file, not TOML, an unknown finding, one named twice, or a share that is none.
    """
    try:
        with open(path, "rb") as stream:
            given = tomllib.load(stream)
    except OSError as error:
        raise InputError(f"--prevalence {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--prevalence {path}: not TOML: {str(error).splitlines()[0]}") from None
    found: dict[str, float] = {}
    for name, share in given.items():
        finding = canonical(name)
        if finding is None:
            raise InputError(f"--prevalence {path}: {name!r} is no known finding{suggestion(name, FINDINGS)}")
        if finding in found:
            raise InputError(f"--prevalence {path}: {finding} is named twice")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise InputError(f"--prevalence {path}: {name} = {share!r}; give a share between 0 and 1, such as 0.02")
        found[finding] = float(share)
    if not found:
        raise InputError(f"--prevalence {path}: names no finding; write lines such as Effusion = 0.12")
    return found
