"""Too little memory or too few processes: what Ray, the system and Python report about it, as one sentence.

Ray's memory monitor ends workers of a node whose memory is nearly full. It reports an OutOfMemoryError for a task, and
an error of the actor for an actor; both contain the same text. A limit of processes (`ulimit -u`, or `pids.max` of a
container) also counts threads, of which TensorFlow and Ray start hundreds.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
from pathlib import Path

import psutil

from ray_cxr.errors import RayCxrError, list_causes

logger = logging.getLogger(__name__)

_MEMORY = re.compile(r"Memory on the node \(IP: ([^,)]+).*?\) was ([\d.]+)GB used / ([\d.]+)GB limit", re.DOTALL)
_KILLED = re.compile("running low on memory|memory usage threshold", re.IGNORECASE)
_LOST = re.compile("died unexpectedly|worker process has died")
#: Ray's first guess about a process that died, such as at the memory limit of a Slurm job or of a container.
_MAYBE_KILLED = "SIGKILL by OOM killer"
_NO_THREAD = re.compile("can't start new thread|thread: Resource temporarily unavailable|pthread_create failed")
_PROCESS_REMEDY = "raise that limit, end other programs, or use fewer CPUs: --set ray.num_cpus=1"
#: What a local Ray with one run of training uses: 400 processes and threads were counted on 2 CPUs. Below the minimum,
#: no worker starts.
_NEEDED, _NEEDED_PER_CPU, _MINIMUM, _MINIMUM_PER_CPU = 300, 50, 150, 15
#: Why workers of this command's own Ray may not start; None if they can.
shortage: str | None = None


def check_processes(cpus: int) -> None:
    """Refuse or warn if a local Ray on this number of CPUs cannot start its processes and threads.

    Otherwise its workers abort or wait without a message when they start a thread.
    """
    global shortage
    free, needed = count_free_processes(), _NEEDED + _NEEDED_PER_CPU * cpus
    if free is None or free >= needed:
        shortage = None
        return
    shortage = (
        f"about {needed:,} processes and threads are needed on {cpus} CPUs, but only {max(0, free):,} more can be "
        f"started ({describe_process_limit()})"
    )
    if free < _MINIMUM + _MINIMUM_PER_CPU * cpus:
        raise RayCxrError(f"Ray: {shortage}; {_PROCESS_REMEDY}")
    logger.warning("WARNING: %s, so workers may be lost; %s", shortage, _PROCESS_REMEDY)


def explain_loss(error: BaseException | None, remedy: str) -> str | None:
    """Return why the system or Ray ended a process, and what to do; None if memory and processes are not the cause.

    `remedy` is what lowers the use of memory.
    """
    is_lost = False
    for cause in list_causes(error):
        text = str(cause)
        is_lost = is_lost or _MAYBE_KILLED in text
        if found := _MEMORY.search(text):
            node, used, limit = found.groups()
            return f"the node {node} ran out of memory ({used} of {limit} GB in use), so Ray ended a worker; {remedy}"
        if _KILLED.search(text) or type(cause).__name__ == "OutOfMemoryError":
            return f"a node ran out of memory, so Ray ended a worker; {remedy}"
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return f"the memory is used up; {remedy}"
        if isinstance(cause, BlockingIOError) or _NO_THREAD.search(text):
            return f"no further process or thread can be started ({describe_process_limit()}); {_PROCESS_REMEDY}"
        if shortage and _LOST.search(text):
            return f"{shortage}; {_PROCESS_REMEDY}"
    # Last, because this is only a guess.
    return f"a worker process died; the usual cause is too little memory: {remedy}" if is_lost else None


def describe_process_limit() -> str:
    """Return the limits of processes and threads that this process has."""
    limits = [f"ulimit -u is {limit:,}" for limit in _read_user_limit()]
    limits += [f"pids.max of the container is {limit:,}" for limit, _ in _read_container_limit()]
    return ", ".join(limits) or "see `ulimit -u`, and `pids.max` of the container"


def count_free_processes() -> int | None:
    """Return how many processes and threads can still be started; None without a limit."""
    free = [limit - used for limit, used in _read_container_limit()]
    if limits := _read_user_limit():
        user = psutil.Process().uids().real
        threads = 0
        for process in psutil.process_iter(["uids", "num_threads"]):
            if process.info["uids"] and process.info["uids"].real == user:
                threads += process.info["num_threads"] or 0
        free.append(limits[0] - threads)
    return min(free, default=None)


def _read_user_limit() -> list[int]:
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return [] if limit == resource.RLIM_INFINITY or os.geteuid() == 0 else [limit]  # it does not bind root


def _read_container_limit() -> list[tuple[int, int]]:
    """Return the limit and the use of the container's control group."""
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):
        try:
            limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("pids.max", "pids.current"))
        except OSError:
            continue
        if limit.isdecimal() and used.isdecimal():
            return [(int(limit), int(used))]
    return []
