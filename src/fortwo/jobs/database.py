"""The connection to the database of jobs: how it is opened, checked and migrated, and what its errors mean.

Errors of the database become fortwo's own, which name the file and the remedy. A database that is locked may work again
in a moment (503); one that is full, read-only or damaged needs somebody (507).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)

from fortwo.errors import InvalidRequest, StorageFailed, Unavailable
from fortwo.home import PRIVATE

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK_SECONDS = 10  # how long a statement waits for another writer, and a connection for its server
RETRY_SECONDS = 5
MIGRATION_LOCK = 4242  # PostgreSQL's number of the lock that a server holds while it migrates the schema
# Errors of PostgreSQL that end when somebody does something, by the beginning of their SQLSTATE.
NEEDS_SOMEBODY = {
    "25006": "Use a server that can be written: this one is read-only.",
    "28": "Correct the user and the password in FORTWO_DATABASE_URL.",
    "3D": "Create the database, or correct its name in FORTWO_DATABASE_URL.",
    "42501": "Grant the user of FORTWO_DATABASE_URL all rights on the database and its schema.",
    "531": "Free space on the disk of the database's server.",
    "XX": "See the log of the database's server, and restore it from a backup.",
}
RESTORE = "Stop the server and restore the file from a backup, or move it away to begin with an empty database."


class DatabaseLocked(Unavailable):
    """Another program holds the database, or its server does not answer."""

    code = "database_unavailable"
    retry_after = RETRY_SECONDS


class DatabaseFailed(StorageFailed):
    """The database cannot be used until somebody repairs it."""

    code = "database_failed"


DATABASE_ERRORS = (DatabaseLocked, DatabaseFailed)


def migrations(database_url: str) -> Config:
    """Alembic's configuration. The migrations are part of the package, so that no alembic.ini is needed."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    return config


def connect(database_url: str) -> Engine:
    """An engine. SQLite gets a write-ahead log, foreign keys, and waits for another writer; connections to a server are
    tried before they are used again, because it may have been restarted. Raises InvalidRequest for what is not a URL of
    a database."""
    try:
        url = make_url(database_url)
        engine = create_engine(
            url,
            json_serializer=partial(json.dumps, allow_nan=False),
            pool_pre_ping=url.get_backend_name() != "sqlite",
            connect_args=_limits(url),
        )
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        raise InvalidRequest(
            f"database_url = {_shown(database_url)} cannot be used: {error}",
            param="database_url",
            hint="Write it like sqlite:////folder/fortwo.db or postgresql+psycopg://user:password@host/database. The "
            "driver of PostgreSQL is installed by: pip install 'fortwo[postgres]'",
        ) from None
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _prepare(connection: Any, _record: Any) -> None:
            timeout = f"busy_timeout={LOCK_SECONDS * 1000}"
            for pragma in (timeout, "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


def _limits(url: URL) -> dict[str, Any]:
    """How long PostgreSQL waits, for drivers that take its own settings and where the URL does not say it."""
    if url.drivername not in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        return {}
    limits = {"connect_timeout": LOCK_SECONDS, "options": f"-c lock_timeout={LOCK_SECONDS}s"}
    return {name: value for name, value in limits.items() if name not in url.query}


def _make_private(engine: Engine) -> None:
    """Create the file of SQLite for this user alone, because it has the rows of every job. One that exists stays as it
    is. Raises DatabaseFailed."""
    file = engine.url.database if engine.dialect.name == "sqlite" else None
    if not file or file.startswith((":memory:", "file:")):
        return
    try:
        Path(file).parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise DatabaseFailed(
            f"The database {file} cannot be created: {error.strerror}.",
            hint="Make its folder writable, or set FORTWO_HOME or FORTWO_DATABASE_URL.",
        ) from None


def check(engine: Engine) -> None:
    """Raises DatabaseFailed when the file of SQLite is damaged, and DatabaseLocked."""
    if engine.dialect.name == "sqlite":
        with errors_of(engine), engine.connect() as connection:
            found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
        if found != "ok":
            raise DatabaseFailed(f"The database {_named(engine.url)} is damaged: {found}.", hint=RESTORE)


def upgrade(engine: Engine, database_url: str) -> None:
    """Check a database, creating it if necessary, and migrate it to the newest schema. Raises DatabaseFailed for one
    that cannot be created, is damaged, or was written by a newer fortwo, and DatabaseLocked."""
    _make_private(engine)
    check(engine)
    with errors_of(engine), engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # servers that share a database may start together
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        if _revision(connection) != newest_revision():
            _migrate(connection, database_url)


def _revision(connection: Connection) -> str | None:
    """Of the schema; None for an empty database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def newest_revision() -> str:
    """That of the last migration, whose file begins with it."""
    return max(file.name for file in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]


def _migrate(connection: Connection, database_url: str) -> None:
    """All migrations in one transaction, so that a server that is killed meanwhile leaves the schema as it was."""
    from alembic import command  # only here, because its import takes a tenth of a start
    from alembic.util import CommandError

    if connection.engine.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # sqlite3 begins no transaction before it changes a schema
    config = migrations(database_url)
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseFailed(
            f"The database {_named(connection.engine.url)} was written by a newer version of fortwo: {error}.",
            hint="Install that version, or begin with an empty database.",
        ) from None


@contextmanager
def errors_of(engine: Engine) -> Iterator[None]:
    """Inside, errors of the database are raised as DatabaseLocked or DatabaseFailed. Wrong statements are not."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError) as error:
        if _remedy(error.orig) is None:
            raise
        raise _meaning(engine, error.orig) from error
    except (DBAPIError, sqlite3.Error) as error:
        raise _meaning(engine, error.orig if isinstance(error, DBAPIError) else error) from error


def _meaning(engine: Engine, error: BaseException | None) -> DatabaseLocked | DatabaseFailed:
    name = getattr(error, "sqlite_errorname", "") or ""
    file = _named(engine.url)
    remedy = _remedy(error)
    if remedy is not None:
        return DatabaseFailed(f"The database {file} cannot be used: {error}.", hint=remedy)
    if engine.dialect.name != "sqlite":
        return DatabaseLocked(
            f"The database {file} cannot be used now: {error}.",
            hint="See that its server runs, and that FORTWO_DATABASE_URL has the right address, user, password and "
            "database; otherwise try again.",
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return DatabaseLocked(
            f"The database {file} cannot be used now: {error}.",
            hint="Another program may hold it: end that, or try again.",
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return DatabaseFailed(f"The database {file} is damaged: {error}.", hint=RESTORE)
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return DatabaseFailed(f"The database {file} cannot be written: {error}.", hint="Free space on its disk.")
    return DatabaseFailed(
        f"The database {file} cannot be used: {error}.", hint="Make the file and its folder writable for the server."
    )


def _remedy(error: BaseException | None) -> str | None:
    """What somebody must do about an error of PostgreSQL; None where waiting may help, and for other databases. When
    the connection itself is refused, the driver gives no SQLSTATE."""
    state = getattr(error, "sqlstate", None) or ""
    found = [remedy for beginning, remedy in NEEDS_SOMEBODY.items() if state.startswith(beginning)]
    return found[0] if found else None


def _named(url: URL) -> str:
    """As messages name it: without a password, which the query of a URL may have too."""
    if url.drivername.startswith("sqlite"):
        return url.database or "in memory"
    return url.set(query={}).render_as_string()


def _shown(database_url: str) -> str:
    try:
        return repr(_named(make_url(database_url)))
    except (ArgumentError, ValueError):
        return "(not shown, it may have a password)" if "@" in database_url else repr(database_url)
