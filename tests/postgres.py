"""A PostgreSQL server for tests, in a temporary folder and on a Unix socket there.

    with run_postgres() as server:
        server.create_database("studies")
        server.url("studies")     # postgresql://tuner:...@/studies?host=/tmp/...

`scripts/services postgres` installs PostgreSQL; tests skip without it. The system's own server is not used.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

USER, PASSWORD = "tuner", "postgres-test-1"
#: Debian installs the programs of each version outside of the PATH.
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([*map(str, reversed(_FOLDERS)), os.environ["PATH"]]))


def is_installed() -> bool:
    return _find("initdb") is not None


class Postgres:
    """A server with one user, who needs a password.

    Args:
        folder: an existing folder for the data, the socket and the log.

    Attributes:
        log: file with the server's own lines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        # PostgreSQL refuses to run as root.
        self._before: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._before = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        self._run(
            "initdb", f"--pgdata={folder / 'data'}", f"--username={USER}", "--auth=scram-sha-256",
            f"--pwfile={secret}", "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "start", "--wait", f"--pgdata={self.folder / 'data'}", f"--log={self.log}", "-o", options)

    def stop(self) -> None:
        """Stop the server and close the connections of its clients."""
        self._run("pg_ctl", "stop", "--mode=fast", "--wait", f"--pgdata={self.folder / 'data'}")

    def url(self, database: str, *, password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@/{database}?host={self.folder}"

    def create_database(self, name: str) -> str:
        """Create an empty database and return its address."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        # `pg_ctl start` leaves the server behind, which would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [*self._before, str(_find(program)), *arguments], cwd=self.folder, stdout=output, stderr=output
            )
            output.seek(0)
            assert done.returncode == 0, output.read()


@contextlib.contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Run PostgreSQL until the end of the block."""
    # Outside of pytest's folders, which other users cannot enter; the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        server = Postgres(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()
