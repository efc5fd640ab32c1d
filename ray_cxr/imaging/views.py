"""Views of chest radiographs: one table for DICOM headers and for label tables.

PA, AP      frontal, with the direction of the rays
FRONTAL     frontal, of unknown direction
LATERAL     from either side, also across a table
OBLIQUE     between frontal and lateral
DECUBITUS   frontal, with the patient lying on one side
AXIAL       frontal, with rays along the body's axis, such as lordotic

Text that names no view of the table, or several (`PA and lateral`), has no view.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

#: Views by the words that name them. Sources:
#: - View Position: DICOM PS3.3, C.8.1.1 and C.8.11.5 (AP PA LL RL LLD RLD LLO RLO)
#: - the column ViewPosition of MIMIC-CXR (LATERAL LL LAO RAO LPO; `PA LLD`, `AP AXIAL`, `XTABLE LATERAL`)
#: - the columns Projection (PA AP L; `AP_horizontal`) and ViewPosition_DICOM (POSTEROANTERIOR ...) of PadChest
#: - the columns Frontal/Lateral and AP/PA of CheXpert
#: - meanings of CID 4010 (`postero-anterior`), and words of devices: `W Chest Lat.`, `CHEST,LAT`, `Thorax p.a.`,
#:   `Thorax seitlich`, `Thorax profil`
_WORDS: dict[str, str] = {
    "PA": "PA POSTEROANTERIOR",
    "AP": "AP ANTEROPOSTERIOR",
    "FRONTAL": "FRONTAL",
    "LATERAL": "LATERAL LAT LL RL LLAT RLAT LATERALE LATERAAL SEITLICH PROFIL PERFIL",
    "OBLIQUE": "OBLIQUE OBL LLO RLO LAO RAO LPO RPO",
    "DECUBITUS": "DECUBITUS DECUB LLD RLD",
    "AXIAL": "AXIAL LORDOTIC",
}
#: Views by the codes of CID 4010, DX View (PS3.16): SNOMED CT, and the older SNOMED-RT with the codes that CID 4010 had
#: before they were corrected. Views that do not exist of a chest are left out.
_CODES: dict[str, str] = {
    "PA": "272479007 R-40888 R-10214",
    "AP": "399348003 R-10206",
    "FRONTAL": "399033003 R-10202",
    "LATERAL": "399067008 R-102CD 399173006 R-10236 399198007 R-10232",
    "OBLIQUE": (
        "399182000 R-102C1 399312000 R-10208 399059000 R-10216 399135007 R-10220 399356000 R-40985 R-10218 399006002 "
        "R-10212 399038007 R-10210 399184004 R-10238 399236003 R-10234 260427002 R-40783 R-10226 399160007 R-10204"
    ),
    "AXIAL": "399061009 R-10241",
}
_OF_WORD = {word: view for view, words in _WORDS.items() for word in words.split()}
_OF_CODE = {code: view for view, codes in _CODES.items() for code in codes.split()}
#: A value of View Position or of a column for views that is this letter alone. In other elements it is the left side.
_ALONE = {"L": "LATERAL"}
#: These describe the image better than the words next to them: `LEFT LATERAL DECUBITUS`, `AP AXIAL`, `PA OBLIQUE`.
_STRONGER = ("DECUBITUS", "OBLIQUE", "AXIAL")
#: `P.A.`, `postero-anterior` and `Posterior/Anterior`, as single words separated by blanks.
_DIRECTIONS = (
    (re.compile(r"\b(?:P A|POSTER(?:O|IOR) ANTERIOR)\b"), "PA"),
    (re.compile(r"\b(?:A P|ANTER(?:O|IOR) POSTERIOR)\b"), "AP"),
)


@functools.lru_cache(maxsize=1024)
def parse_view(text: str) -> str | None:
    """Return the view that a value of View Position or of a column for views names, or None."""
    return _ALONE.get(_split_words(text)) or parse_view_text(text)


@functools.lru_cache(maxsize=1024)
def parse_view_text(text: str) -> str | None:
    """Return the view that free text names, or None."""
    words = _split_words(text)
    for pattern, word in _DIRECTIONS:
        words = pattern.sub(word, words)
    named = {_OF_WORD[word] for word in words.split() if word in _OF_WORD}
    for view in _STRONGER:
        if view in named:
            return view
    if len(named) > 1:
        named.discard("FRONTAL")
    return named.pop() if len(named) == 1 else None


def _split_words(text: str) -> str:
    """Return the words of a text in capitals without accents, separated by blanks."""
    letters = unicodedata.normalize("NFKD", text.upper())
    return " ".join(re.findall(r"[A-Z0-9]+", "".join(c for c in letters if not unicodedata.combining(c))))


def parse_view_code(code: str) -> str | None:
    """Return the view of a SNOMED code, or None."""
    return _OF_CODE.get(code.strip().upper())


def choose_view(views: Iterable[str | None]) -> str | None:
    """Return the first view that several sources name; PA and AP replace FRONTAL, which is less exact."""
    known = [view for view in views if view is not None]
    if known[:1] == ["FRONTAL"]:
        known = [view for view in known if view in ("PA", "AP")][:1] or known
    return known[0] if known else None
