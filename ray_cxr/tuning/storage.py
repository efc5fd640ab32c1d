"""Optuna's record of a search: STUDY/study.db, or a database that `tune.storage` names.

A bucket cannot hold a SQLite file that changes. The command then works on a copy on its own disk, and uploads it after
each event of a trial; no other process opens the record while the command runs.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import optuna
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from ray_cxr import extras
from ray_cxr.errors import ConfigError, first_line, list_causes
from ray_cxr.storage import atomic, remote

#: Seconds to wait for a SQLite database that another program has locked: when the search starts, and later.
START_LOCK_S, LOCK_S = 20.0, 120.0
#: Seconds between two attempts to make the tables of an empty database.
_TABLES_WAIT_S = 1.0
_FILE = "study.db"
#: What to do if the message of a database contains a word.
_REMEDIES = {
    "locked": "another program has locked it: end that program",
    "readonly": "make the file and its folder writable",
    "not a database": "it is damaged: restore it from a backup, or choose another --out",
    "malformed": "it is damaged: restore it from a backup, or choose another --out",
    "unable to open": "check that its folder exists and is writable",
    "full": "free some space",
    "does not exist": "create it",
    "authentication failed": "check the password, in the address, PGPASSWORD or ~/.pgpass",
}


class StudyStorage:
    """Where Optuna keeps a search; `str` of it is the address without a password.

    Args:
        out: the folder of the search.
        url: the setting `tune.storage`; None: the study's own file.

    Raises:
        ConfigError: the address is wrong, or the driver of its database is missing.
    """

    def __init__(self, out: Path, url: str | None) -> None:
        self._out, self._url = out, url
        self._shown = _make_address(out) if url is None else _check_address(url)
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def __str__(self) -> str:
        return self._shown

    def open(self) -> optuna.storages.RDBStorage:
        """Open the storage, with new tables if it has none; raise an error of the database if that fails."""
        url = self._url or _make_address(self._prepare_file())
        options = {}
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": LOCK_S}}
            _check_writable(url)
        for _ in range(2):
            try:
                return _connect(url, options)
            except SQLAlchemyError as error:
                if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                    raise
                # Another command makes the tables at the same time.
                time.sleep(_TABLES_WAIT_S)
        return _connect(url, options)

    def save(self) -> None:
        """Upload the file of a study in a bucket."""
        if self._copy is not None:
            atomic.write_bytes(self._out / _FILE, (Path(self._copy.name) / _FILE).read_bytes())

    def _prepare_file(self) -> Path:
        """Return the local folder of the study's own file: for a bucket, one with a copy."""
        if remote.as_store_path(self._out) is None:
            return self._out.absolute()
        self._copy = tempfile.TemporaryDirectory(prefix="ray_cxr-")
        with contextlib.suppress(FileNotFoundError):
            (Path(self._copy.name) / _FILE).write_bytes((self._out / _FILE).read_bytes())
        return Path(self._copy.name)


def explain_database_error(error: BaseException) -> str:
    """Return the message of the database, which Optuna's errors hide, and what to do."""
    originals = (cause.orig for cause in list_causes(error) if isinstance(cause, DBAPIError))
    message = first_line(next(filter(None, originals), error))
    remedy = next((remedy for word, remedy in _REMEDIES.items() if word in message), "check the database")
    return f"{message}; {remedy}, then run the same command again to continue"


def _connect(url: str, options: dict[str, dict[str, float]]) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **options})


def _check_address(url: str) -> str:
    """Return an address without its password."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "tune.storage: not an Optuna storage; write a database URL such as sqlite:////data/studies.db or "
            "postgresql://user@host/name, or leave it out for STUDY/study.db"
        ) from None
    if "@" in (parts.host or ""):
        # The text before the second @, a part of the password, would be shown as the host.
        raise ConfigError("tune.storage: contains two @; write the password's as %40")
    _check_driver(parts)
    # The query of the URL may contain a password too.
    return parts.set(query={}).render_as_string(hide_password=True)


def _check_driver(parts: URL) -> None:
    """Raise ConfigError if the driver of a database cannot be imported."""
    try:
        parts.get_dialect().import_dbapi()
    except NoSuchModuleError:
        known = "sqlite, postgresql or mysql+pymysql"
        raise ConfigError(f"tune.storage: unknown kind of database {parts.drivername}; write {known}") from None
    except ImportError as error:
        if error.name == "psycopg":
            raise ConfigError(f"tune.storage: {parts.drivername} {extras.install_hint('psycopg')}") from None
        if error.name == "MySQLdb":  # SQLAlchemy's default, which PyPI lacks
            raise ConfigError("tune.storage: write mysql+pymysql://..., and install the package pymysql") from None
        missing = f"the package {error.name}" if error.name else f"its driver ({first_line(error)})"
        raise ConfigError(f"tune.storage: {parts.drivername} needs {missing}; install it on this machine") from None


def _check_writable(url: str) -> None:
    """Write to a SQLite database without a change; raise its error within `START_LOCK_S` seconds if that fails."""
    engine = create_engine(url, connect_args={"timeout": START_LOCK_S})
    try:
        with engine.connect() as connection:
            version = connection.execute(text("PRAGMA user_version")).scalar()
            connection.execute(text(f"PRAGMA user_version = {version}"))
    finally:
        engine.dispose()


def _make_address(out: Path) -> str:
    """Return the address of STUDY/study.db. In a SQLite URL, `?`, `%` and `{}` are escaped (`%3F`), because Optuna and
    SQLAlchemy interpret them.
    """
    return str(out / _FILE) if remote.as_store_path(out) is not None else f"sqlite:///{quote(str(out / _FILE))}"
