"""Where trials are kept: a journal file in the study's folder, a database, or Optuna's gRPC proxy.

The journal needs more than Optuna gives it: a process killed while it appends leaves half a line, after which
Optuna's file can no longer be read, and a lock file that others wait for. Here the lock is the kernel's, which
ends with its process, and whoever gets it cuts off what an append has left unfinished.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from nas_gate.errors import Refused

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONNECT_SECONDS = 5
DRIVER = "pip install 'nas-gate[postgresql]'"


class Lock:
    """An exclusive lock on a file, over processes and threads; the kernel frees it when its process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Lock; False if another holds it and `wait` is False. Without such locks (Windows) always True."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.close()
                return False
            except BaseException:
                file.close()
                raise
        self._file = file
        return True

    def release(self) -> None:
        """Let others have it."""
        file, self._file = self._file, None
        if file is not None:
            if fcntl is not None:  # closing is not enough where a forked process holds the file, too
                fcntl.flock(file, fcntl.LOCK_UN)
            file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`."""
    lock = Lock(path)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class JournalLock:
    """The lock that Optuna's journal takes for every append; see the module's text."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        # another name than Optuna's lock has, which a dashboard takes when it writes a note, and breaks after a while
        self._lock = Lock(journal.with_name(f".{journal.name}.lock"))

    def acquire(self) -> bool:
        """Lock, and leave the journal ending with a whole line."""
        self._lock.acquire()
        try:
            _cut_unfinished_line(self._journal)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Let others append."""
        self._lock.release()


def _cut_unfinished_line(path: Path) -> None:
    with path.open("r+b") as file:
        end = keep = file.seek(0, 2)
        while keep > 0:
            begin = max(0, keep - 4096)
            file.seek(begin)
            newline = file.read(keep - begin).rfind(b"\n")
            if newline >= 0:
                keep = begin + newline + 1
                break
            keep = begin
        if keep < end:
            file.truncate(keep)


def in_folder(url: str | None) -> bool:
    """Whether all who use this storage also use one file system."""
    return url is None or url.startswith("sqlite:")


def shown(url: str | None, folder: Path) -> str:
    """The storage for people: without its password."""
    if url is None:
        return str(folder / "journal.log")
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else url


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage of a study; Refused, within seconds, where it cannot be reached."""
    if url is None:
        journal = folder / "journal.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = JournalLock(journal) if fcntl is not None else JournalFileOpenLock(str(journal))
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme == "grpc":
        return _grpc(url)
    if scheme not in ("sqlite", "postgresql"):
        raise Refused(f"storage must be null, sqlite:///FILE, postgresql://... or grpc://HOST:PORT, but is {url!r}.")
    return _database(url, scheme, shown(url, folder))


def _database(url: str, scheme: str, where: str) -> BaseStorage:
    if scheme == "sqlite":
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}  # seconds that writers wait for each other
    else:
        if url.startswith("postgresql:"):  # SQLAlchemy's own choice of a driver changes with its version
            url = f"postgresql+psycopg{url.removeprefix('postgresql')}"
        # a connection may have been lost during hours of training
        options = {"connect_args": {"connect_timeout": CONNECT_SECONDS}, "pool_pre_ping": True}
    for patience in (0.1, 0.3, 1.0, 3.0, None):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            raise Refused(f"The storage {where} needs a driver: {DRIVER}") from error
        except OperationalError as error:
            if scheme == "sqlite" and "already exists" in str(error) and patience is not None:
                time.sleep(patience)
                continue
            raise Refused(f"The storage {where} cannot be reached: {error.orig}") from error
        except (IntegrityError, ProgrammingError) as error:
            if patience is None:
                raise Refused(f"The storage {where} cannot be used: {error.orig}") from error
            time.sleep(patience)  # another process is making the same tables
        except (ArgumentError, SQLAlchemyError, ValueError, RuntimeError) as error:
            raise Refused(f"The storage {where} cannot be used: {error}") from error
    raise AssertionError


def _grpc(url: str) -> BaseStorage:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Refused(f"storage: {url}: {error}") from error
    if host is None or port is None:
        raise Refused(f"storage must be grpc://HOST:PORT, but is {url!r}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # asked for by name
            storage = GrpcStorageProxy(host=host, port=port)
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ImportError as error:
        raise Refused(f"The storage {url} needs gRPC: pip install 'nas-gate[grpc]'") from error
    except ConnectionError as error:
        raise Refused(f"The storage {url} cannot be reached: no answer in {CONNECT_SECONDS} seconds.") from error
    return storage
