"""Read images of a PACS, and store documents in it, over DICOMweb (DICOM PS3.18).

An address is `dicomweb+https://HOST[:PORT]/ROOT`; `dicomweb+http` is for the loopback interface only.

    dicomweb+https://host/dicom-web?StudyDate=20260101-&ModalitiesInStudy=DX      a search: `search`
    dicomweb+https://host/dicom-web/studies/S/series/E/instances/I                an instance: `fetch_instance`
    dicomweb+https://host/dicom-web                                               `store`

`configure` sets credentials and limits once per process, before the first request. Without it the defaults of
`PacsSettings` hold, which have no credentials. Nothing that is open is pickled or survives a fork.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray_cxr.config import PacsSettings
from ray_cxr.storage.stores import MAX_BYTES


class Limiter(Protocol):
    """Grants requests to a PACS."""

    def slot(self) -> AbstractContextManager[None]:
        """Wait until a request may start; the slot is free again when the block ends.

        A block lasts at most `timeout_s`. Waits between attempts are outside of it.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """What a PACS did with one document."""

    sop_instance_uid: str
    status: Literal["accepted", "warned", "refused", "unavailable"]  # unavailable: no answer; send it again later
    reason: int | None  # warning or failure reason of PS3.18, table I.2-2, such as 0x0122; None if the PACS gave none
    message: str  # one line, without the address


def configure(settings: PacsSettings, limiter: Limiter | None = None) -> None:
    """Set credentials and limits for this process, and check the files that the settings name.

    Args:
        limiter: Grants the requests of a whole cluster; None: one of this process with `settings.parallel` and
            `settings.per_second`.

    Raises:
        ConfigError: A file is missing, open to other users, or not of its kind. No message quotes the file.
    """
    raise NotImplementedError


def check_search(address: str) -> None:
    """Raise InputError if an address is not one of a search. No message quotes credentials or the query."""
    raise NotImplementedError


def check_root(address: str) -> None:
    """Raise InputError if an address is not one to store at: `dicomweb+https://HOST/ROOT`, without a query."""
    raise NotImplementedError


def make_instance_path(address: str, study: str, series: str, instance: str) -> str:
    """Return the path of an instance, from the address of a search and three UIDs.

    Raises:
        ImageError: `corrupt`: a UID is longer than 64 characters or has other characters than digits and dots.
    """
    raise NotImplementedError


def fetch_instance(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the DICOM file of one instance as the PACS has it (WADO-RS, any transfer syntax).

    Raises:
        ImageError: `missing` (404, 410, or not the path of an instance), `permission` (401, 403), `too_large`, `empty`,
            or `storage` (no answer after all attempts, another answer than a DICOM file). The message omits the path.
    """
    raise NotImplementedError


def fetch_metadata(path: str) -> dict[str, Any]:
    """Return the header of one instance in the DICOM JSON model (PS3.18 F); the errors are those of `fetch_instance`."""
    raise NotImplementedError


def search(address: str) -> Iterator[dict[str, Any]]:
    """Yield each instance that a search finds once, in the DICOM JSON model, page by page (QIDO-RS).

    Keys are tags as in `"00080018"`. Study, series and SOP Instance UID are checked; other values can be missing or of
    any type.

    Raises:
        InputError: The address is wrong, the PACS cannot be searched, or the listing would not be complete.
    """
    raise NotImplementedError


def store(address: str, documents: Iterable[bytes]) -> Iterator[Stored]:
    """Store DICOM files, one request each (STOW-RS), and yield what the PACS did with each, in order.

    Args:
        address: `dicomweb+https://HOST/ROOT`.
        documents: Complete DICOM files (PS3.10).

    Raises:
        InputError: The address is wrong. All other failures are yielded.
    """
    raise NotImplementedError
