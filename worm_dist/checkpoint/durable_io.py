"""Disk: bytes that last once they are written, and that are read only if they are the same."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..errors import CheckpointError

__all__ = [
    "FileDigest",
    "Part",
    "check_size",
    "file_size",
    "open_sealed",
    "read_small",
    "reading",
    "sync_folder",
    "write_file",
    "writing",
]

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Part(BaseModel):
    """A strict, frozen piece of what is written as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileDigest(Part):
    """What a file must still be when it is read.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal digits.
    """

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system become a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"{path}: disk full ({error.strerror}); it is not written, what was there "
                "before is as it was; free some space"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system become a CheckpointError that names the path."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: wanted this file, found none") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write a new file and wait until the disk has it.

    The bytes are hashed on their way out of memory, so whatever changes them later is found.

    Raises:
        CheckpointError: the disk is full or cannot be written, or the file is there already.
    """
    digest, size = hashlib.sha256(), 0
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                digest.update(rest)
                size += len(rest)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return FileDigest(size=size, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def open_sealed(path: Path, seal: FileDigest) -> Iterator[BufferedReader]:
    """A file whose size and hash have been compared with its seal, at its beginning.

    What is read is what was compared, even if another file takes its name meanwhile.

    Raises:
        CheckpointError: it is missing, is no plain file, or is not what was sealed.
    """
    with reading(path), _open(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, seal)
        digest = hashlib.sha256()
        chunk = memoryview(bytearray(_CHUNK))
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
        if digest.hexdigest() != seal.sha256:
            raise CheckpointError(
                f"{path}: wanted sha256 {seal.sha256}, found {digest.hexdigest()}; the file was "
                "damaged or replaced"
            )
        file.seek(0)
        yield file


def check_size(path: Path, size: int, seal: FileDigest) -> None:
    """Raises a CheckpointError if the size is not the sealed one."""
    if size != seal.size:
        raise CheckpointError(
            f"{path}: wanted {seal.size} bytes, found {size}; the file was cut short or replaced"
        )


def file_size(path: Path) -> int:
    """Of a plain file; links are not followed.

    Raises:
        CheckpointError: it is missing or is no plain file.
    """
    with reading(path):
        status = os.lstat(path)
    _check_plain(path, status.st_mode)
    return status.st_size


def read_small(path: Path, limit: int) -> bytes:
    """The whole of a file that may not have more bytes than the limit.

    Raises:
        CheckpointError: it is missing, is no plain file, or is larger.
    """
    with reading(path), _open(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path}: wanted at most {limit} bytes, found more")
    return content


def _open(path: Path) -> BufferedReader:
    # A link could lead anywhere, and to open a pipe could take for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path}: wanted a plain file, found a link") from error
        raise
    try:
        _check_plain(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _check_plain(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: wanted a plain file, found something else of that name")
