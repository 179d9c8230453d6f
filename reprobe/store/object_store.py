"""A prefix of an object store as the place of a store: s3://bucket/prefix.

Enters: a URL; credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP …). Leaves: a `Place`.
An object appears whole or not at all, so there are no temporary names and nothing to sync; there are no locks
either, and `write_new` is a conditional put.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, BinaryIO, cast

import obstore
import zarr.storage
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url
from zarr.abc.store import Store

from reprobe.errors import StoreUnreachable
from reprobe.provenance import digest_chunks
from reprobe.store.layout import LOCK, is_store_file
from reprobe.store.places import Survey

#: Without credentials the machine's metadata service is asked for some; where there is none, these end it soon.
_CLIENT: dict[str, Any] = {"connect_timeout": "3s", "timeout": "120s"}
_RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
#: Bytes fetched at once where a file is read in small parts.
_BLOCK_BYTES = 2**18


class ObjectStore:
    """The objects below a URL."""

    def __init__(self, url: str) -> None:
        self.path = url.rstrip("/")

    def __str__(self) -> str:
        return self.path

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.path,)  # a process that receives it connects by itself

    @cached_property
    def _store(self) -> Any:
        insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        with self.failures():
            options: Any = {**_CLIENT, "allow_http": insecure}
            return from_url(self.path, client_options=options, retry_config=_RETRIES)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def exists(self) -> bool:
        with self.failures():
            return any(batch for batch in obstore.list(self._store, chunk_size=1))

    def read(self, name: str) -> bytes:
        with self.failures():
            return bytes(obstore.get(self._store, name).bytes())

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` … `stop` − 1 of an object."""
        with self.failures():
            return bytes(obstore.get_range(self._store, name, start=start, end=stop))

    def size(self, name: str) -> int | None:
        try:
            with self.failures():
                return int(obstore.head(self._store, name)["size"])
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str:
        with self.failures():
            return digest_chunks(obstore.get(self._store, name).stream())

    def open(self, name: str) -> BinaryIO:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(self.at(name))
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, name, size), _BLOCK_BYTES))

    def names(self, folder: str) -> frozenset[str]:
        return frozenset(name for name, _ in self._listed(folder))

    def survey(self) -> Survey:
        found = dict(self._listed(None))
        files = {name: size for name, size in sorted(found.items()) if is_store_file(name)}
        return Survey(files, (), (), tuple(sorted(found.keys() - files.keys() - {LOCK})))

    def _listed(self, prefix: str | None) -> Iterator[tuple[str, int]]:
        with self.failures():
            for batch in obstore.list(self._store, prefix):
                yield from ((entry["path"], int(entry["size"])) for entry in batch)

    def prepare(self, names: Iterable[str]) -> None:
        """Nothing: an object store has no folders."""

    def write(self, name: str, data: bytes) -> None:
        with self.failures():
            obstore.put(self._store, name, data)

    def write_new(self, name: str, data: bytes) -> None:
        with self.failures():
            obstore.put(self._store, name, data, mode="create")

    def remove(self, name: str) -> None:
        with self.failures():
            obstore.delete(self._store, name)

    def zarr(self) -> Store:
        return zarr.storage.ObjectStore(self._store, read_only=True)

    def failures(self) -> AbstractContextManager[None]:
        return _failures(self.path)


class _Ranges(io.RawIOBase):
    """An object as a file that is read by ranges."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._store.read_range(self._name, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _failures(url: str) -> Iterator[None]:
    try:
        yield
    except AlreadyExistsError as error:
        raise FileExistsError(f"{url}: {_said(error)}") from error
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreUnreachable(_no_bucket(url)) from error
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreUnreachable(
            f"{url}: access is refused ({_said(error)}). The credentials in the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) may not list, read and write there, or have expired."
        ) from error
    except BaseError as error:
        if "NoSuchBucket" in str(error):
            raise StoreUnreachable(_no_bucket(url)) from error
        if "/latest/api/token" in str(error) or "/latest/meta-data" in str(error):
            raise StoreUnreachable(
                f"{url}: there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION) "
                "in the environment; for a public bucket set AWS_SKIP_SIGNATURE=true."
            ) from error
        raise StoreUnreachable(
            f"{url} cannot be used ({_said(error)}). Is the endpoint right (AWS_ENDPOINT_URL; for plain http also "
            "AWS_ALLOW_HTTP=true), and the region (AWS_REGION)? Committed shards are kept: go on with --resume."
        ) from error


def _no_bucket(url: str) -> str:
    return (
        f"{url}: there is no such bucket at this endpoint. Make it, or check the name, AWS_REGION and AWS_ENDPOINT_URL."
    )


def _said(error: Exception) -> str:
    """What the server or the network said, without the library's debugging text."""
    return str(error).split("\n\nDebug source:")[0].split("<?xml")[0].strip().rstrip(":")
