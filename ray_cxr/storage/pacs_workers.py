"""How the workers of a run reach a PACS: one gate for all requests, and fetches that run ahead of the decoders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ray_cxr import cluster, telemetry
from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError, ImageError
from ray_cxr.request_gate import GateLimiter, open_gate
from ray_cxr.storage import dicomweb
from ray_cxr.storage.paths import is_dicomweb
from ray_cxr.storage.prefetch import fetch_ahead

K = TypeVar("K")
S = TypeVar("S")

#: Bytes of instances that wait for a decoder, in each process: half of them here, and half in the caller's own queue.
BYTES_AHEAD = 256 * 1024 * 1024
#: Maximum number of threads per process that fetch; `pacs.parallel` is for all processes of a run.
MAX_THREADS = 16


@dataclass(frozen=True)
class PacsAccess:
    """The settings of a PACS, and the name of the gate that grants the requests of all workers.

    Without a gate, which needs Ray, each process limits its own requests.
    """

    settings: PacsSettings
    gate: str | None = None

    def connect(self) -> GateLimiter | None:
        """Let this process use the settings and the gate; return the gate."""
        gate = GateLimiter(self.gate) if self.gate else None
        dicomweb.configure(self.settings, gate)
        return gate

    def read_totals(self) -> dict[str, float]:
        """Return the totals of all workers: `requests`, `instances`, `bytes` and `seconds`; `{}` without a gate."""
        return GateLimiter(self.gate).read_totals() if self.gate else {}


@contextlib.contextmanager
def open_access(settings: PacsSettings, image: str) -> Iterator[PacsAccess]:
    """Run the gate of a run while the block runs.

    Args:
        image: path of an instance, which every node must be able to fetch.

    Raises:
        ConfigError: a node cannot reach the PACS, or lacks a file that the settings name.
    """
    with open_gate(settings) as gate:
        access = PacsAccess(settings, gate)
        _require_nodes(access, image)
        yield access


def _require_nodes(access: PacsAccess, image: str) -> None:
    """Refuse a PACS that this process can reach and a node cannot; with a single node, do nothing."""
    if len(cluster.list_alive()) < 2:
        return

    def find_problem(access: PacsAccess, image: str) -> str:
        from ray_cxr import errors  # nested, see `query_nodes`
        from ray_cxr.storage import dicomweb

        try:
            access.connect()
            dicomweb.fetch_instance(image)
        except errors.ImageError as error:
            return error.message if error.code == "storage" else ""
        except errors.RayCxrError as error:
            return str(error)
        return ""

    if find_problem(access, image):  # the instance itself cannot be fetched: its row will say so
        return
    for node, problem in cluster.query_nodes(find_problem, cluster.list_nodes(), access, image):
        if problem:
            raise ConfigError(
                f"the node {node['NodeManagerAddress']} cannot fetch images of the PACS: {problem}; every node needs "
                "a route to the PACS, and the files that the settings pacs.* name"
            )


class PacsFetcher:
    """Replaces paths of instances by their contents, for all readers of a process; `command` labels the metrics."""

    def __init__(self, access: PacsAccess, command: str) -> None:
        self._gate = access.connect()
        self._command, self._threads = command, min(MAX_THREADS, access.settings.parallel)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="pacs")

    def fetch_ahead(self, items: Iterable[tuple[K, S]]) -> Iterator[tuple[K, S | bytes | ImageError]]:
        """Yield the items in order; an instance of a PACS becomes its contents, or the reason why it has none."""
        return fetch_ahead(self._pool, self._fetch, items, threads=self._threads, max_bytes=BYTES_AHEAD // 2)

    def _fetch(self, source: S) -> S | bytes | ImageError:
        if not (isinstance(source, str) and is_dicomweb(source)):
            return source
        started = time.monotonic()
        content: bytes | ImageError
        try:
            content = dicomweb.fetch_instance(source)
        except ImageError as error:
            content = error
        size, seconds = len(content) if isinstance(content, bytes) else 0, time.monotonic() - started
        telemetry.add_fetch(self._command, size, seconds)
        if self._gate is not None:
            self._gate.add(instances=1, bytes=size, seconds=seconds)
        return content
