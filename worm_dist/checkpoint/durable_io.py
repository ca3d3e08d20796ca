"""Durable writes and verified reads: files are synced, hashed, and compared before use."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..digest import sha256_of
from ..errors import CheckpointError
from ..schema import Schema

__all__ = [
    "FileDigest",
    "check_size",
    "file_size",
    "open_plain",
    "open_verified",
    "read_small",
    "reading",
    "sync_folder",
    "write_file",
    "write_json",
    "writing",
]

_CHUNK_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileDigest(Schema):
    """Size and hash of a file, by which it is verified when it is read.

    Attributes:
        size: file size in bytes.
        sha256: SHA-256 of the content, 64 hexadecimal digits.
    """

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing into a ``CheckpointError`` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise CheckpointError(
                f"{path}: disk full ({error.strerror}); nothing was written, what was "
                "there before is unchanged; free some space"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of reading into a ``CheckpointError`` that names the path."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: wanted this file, found none") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write a new file and sync it to disk.

    The bytes are hashed as they leave memory, so any later change to the file is detected.

    Args:
        path: path of the file, which must not exist.
        chunks: content of the file, in order.

    Returns:
        Size and hash of what was written.

    Raises:
        CheckpointError: the disk is full or cannot be written, or the file exists already.
    """
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            sha256 = sha256_of(_written(descriptor, chunks))
            os.fsync(descriptor)
            return FileDigest(size=os.fstat(descriptor).st_size, sha256=sha256)
        finally:
            os.close(descriptor)


def _written(descriptor: int, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        yield chunk


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a part.

    If it cannot be written, nothing of it stays on disk.

    Args:
        path: the file to write or replace.
        content: the JSON value.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: the content has a NaN or an infinity, which JSON does not support.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, so that new and renamed files in it survive a crash."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def open_verified(path: Path, expected: FileDigest) -> Iterator[BufferedReader]:
    """Open a file after verifying its size and hash.

    The verified file is the one that is read, even if another file takes its name meanwhile.

    Args:
        path: path of the file.
        expected: size and hash from when the file was written.

    Yields:
        The open file, positioned at its start.

    Raises:
        CheckpointError: the file is missing, not a regular file, or differs from ``expected``.
    """
    with reading(path), open_plain(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, expected)
        found = sha256_of(iter(partial(file.read, _CHUNK_BYTES), b""))
        if found != expected.sha256:
            raise CheckpointError(
                f"{path}: wanted sha256 {expected.sha256}, found {found}; the file was damaged or "
                "replaced"
            )
        file.seek(0)
        yield file


def check_size(path: Path, size: int, expected: FileDigest) -> None:
    """Check the size of a file.

    Args:
        path: path of the file, for the error message.
        size: present size of the file in bytes.
        expected: size and hash from when the file was written.

    Raises:
        CheckpointError: the sizes differ.
    """
    if size != expected.size:
        raise CheckpointError(
            f"{path}: wanted {expected.size} bytes, found {size}; the file was truncated or "
            "replaced"
        )


def file_size(path: Path) -> int:
    """The size of a regular file in bytes; symbolic links are not followed.

    Raises:
        CheckpointError: the file is missing or not a regular file.
    """
    with reading(path):
        status = os.lstat(path)
    _check_plain(path, status.st_mode)
    return status.st_size


def read_small(path: Path, limit: int) -> bytes:
    """Read a whole file of limited size.

    Args:
        path: path of the file.
        limit: largest size allowed, in bytes.

    Raises:
        CheckpointError: the file is missing, not a regular file, or larger than ``limit``.
    """
    with reading(path), open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path}: wanted at most {limit} bytes, found more")
    return content


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading; within ``reading``, which turns its errors."""
    # A symbolic link could lead anywhere, and opening a pipe could block forever.
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
