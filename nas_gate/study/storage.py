"""Where a study's trials are kept, and the file locks that let processes of one machine see each other die."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage

from nas_gate.search import Refused

JOURNAL = "journal.log"
PATIENCE = 5  # seconds that a database or a proxy has to answer the first call
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- locks --------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes, which wait. The kernel lets go when the holder dies, however."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """A lock for Optuna's journal file that a killed process does not keep, and that mends a torn last line.

    Optuna's own lock files stay for 30 seconds after a SIGKILL. A line that a full disk or a power cut left
    unfinished would make the journal unreadable with the next line; nobody has read it yet, so it is cut off.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name(f".{journal.name}.lock")
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then cut off what has no line end."""
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with self._journal.open("rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            whole, block = end, 4096
            while whole > 0:
                begin = max(0, whole - block)
                journal.seek(begin)
                if (found := journal.read(whole - begin).rfind(b"\n")) >= 0:
                    whole = begin + found + 1
                    break
                whole = begin
            if whole < end:
                journal.truncate(whole)
        return True

    def release(self) -> None:
        """Let go."""
        assert self._file is not None
        self._file.close()
        self._file = None


class Members:
    """The processes that work on a study, each named by an id and known to live by a lock that it holds.

    `home` is a folder that they share; across machines without a shared folder nothing is known, and the
    heartbeat decides.
    """

    def __init__(self, home: Path, supervisor: str | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._home, self._host = home, socket.gethostname()
        self.me = f"{self._host}-{os.getpid()}-{secrets.token_hex(4)}"
        path, hidden = home / self.me, home / f".{self.me}"
        self._file = hidden.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        json.dump({"host": self._host, "supervisor": supervisor}, self._file)
        self._file.flush()
        hidden.rename(path)  # from its first moment a visible file is locked

    def leave(self) -> None:
        """End this process's membership."""
        (self._home / self.me).unlink(missing_ok=True)
        self._file.close()

    def forget(self, member: str) -> None:
        """Remove what a dead member left."""
        (self._home / member).unlink(missing_ok=True)

    def lives(self, member: str) -> bool | None:
        """Whether `member` lives; None where that cannot be seen from here."""
        told = self._read(member)
        if told is None:
            return None
        try:
            with (self._home / member).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        # some network file systems lock within one machine only
        return False if told["host"] == self._host else None

    def died_alone(self, member: str) -> bool:
        """Whether the dead `member` had a supervisor that lives: then nobody stopped the whole program."""
        told = self._read(member)
        return told is not None and told["supervisor"] is not None and self.lives(told["supervisor"]) is True

    def _read(self, member: str) -> dict[str, str | None] | None:
        try:
            told: dict[str, str | None] = json.loads((self._home / member).read_text())
        except (OSError, ValueError):
            return None
        return told


# --- storages -----------------------------------------------------------------------------------------------


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage at `url`, or the journal file in `folder`.

    `sqlite:///file`, `postgresql://user@host/database` (any database of SQLAlchemy's), `grpc://host:port`
    (Optuna's proxy). Refused within seconds where nothing answers.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / JOURNAL
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal)))  # type: ignore[arg-type]
    parts = urlsplit(url)
    if "://" not in url:
        raise Refused(
            f"`storage` must be null (a journal file), sqlite:///file, postgresql://user@host/database or "
            f"grpc://host:port, but is {url!r}."
        )
    if parts.scheme == "grpc":
        return _proxy(parts.hostname or "localhost", parts.port or 13000, url)
    return _database(url)


def _proxy(host: str, port: int, url: str) -> BaseStorage:
    try:
        proxy = GrpcStorageProxy(host=host, port=port)
        proxy.wait_server_ready(timeout=PATIENCE)
    except (ImportError, ConnectionError) as error:
        raise Refused(f"The study's storage {url} does not answer: {error}") from error
    return proxy


def _database(url: str) -> BaseStorage:
    from sqlalchemy.exc import SQLAlchemyError

    backend, _, rest = url.partition("://")
    arguments: dict[str, int] = {}
    if backend == "postgresql":
        url, arguments = f"postgresql+psycopg://{rest}", {"connect_timeout": PATIENCE}
    elif backend == "sqlite":
        arguments = {"timeout": 60}  # a file has one writer at a time: wait for it
    for attempt in range(10):
        try:
            # connections that died during a long trial are found before they are used
            return RDBStorage(url, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True})
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            # another process makes the same tables at this moment
            if attempt < 9 and any(word in str(error).lower() for word in ("already exists", "duplicate", "unique")):
                time.sleep(0.1 * (attempt + 1))
                continue
            raise Refused(f"The study's storage {without_password(url)} cannot be used: {reason}") from error
    raise AssertionError


def without_password(url: str) -> str:
    """`url` as it may be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{place}"))


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notices that a name is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def disk_is_full(error: BaseException) -> bool:
    """Whether `error`, or what it came from, is that nothing more can be written."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
