"""Prevalences of the findings in the population where a model will be used."""

from __future__ import annotations

import tomllib

from ray_cxr.errors import InputError, first_line
from ray_cxr.labels import FINDINGS, canonicalize, suggest


def read_prevalences(path: str) -> dict[str, float]:
    """Read a TOML file of `Finding = share` lines, shares between 0 and 1."""
    try:
        with open(path, "rb") as stream:
            shares = tomllib.load(stream)
    except OSError as error:
        raise InputError(f"--prevalence {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--prevalence {path}: not TOML: {first_line(error)}") from None
    prevalences: dict[str, float] = {}
    for name, share in shares.items():
        finding = canonicalize(name)
        if finding is None:
            raise InputError(f"--prevalence {path}: {name!r} is not a known finding{suggest(name, FINDINGS)}")
        if finding in prevalences:
            raise InputError(f"--prevalence {path}: {finding} is named twice")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise InputError(f"--prevalence {path}: {name} = {share!r}; use a share between 0 and 1, such as 0.02")
        prevalences[finding] = float(share)
    if not prevalences:
        raise InputError(f"--prevalence {path}: names no finding; add lines such as Effusion = 0.12")
    return prevalences
