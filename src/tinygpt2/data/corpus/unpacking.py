"""Unpack files as they are read: compressed streams, tar and zip archives. The first bytes show how one is packed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any, Literal

from tinygpt2.data.corpus.formats import HEAD
from tinygpt2.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# What the libraries raise for damaged files, apart from OSError, ValueError and OverflowError
DAMAGE = (
    EOFError, NotImplementedError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zstd.ZstdError
)  # fmt: skip
MOST_LAYERS = 4  # of compression around one file, and of archives in archives

Archive = Literal["tar", "zip"]


class _FullReads(io.RawIOBase):
    """A stream that returns less than was asked for only at its end, so that `peek` sees enough."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view) and (block := self._stream.read(len(view) - filled)):
            view[filled : filled + len(block)] = block
            filled += len(block)
        return filled


def _buffered(stream: Any) -> io.BufferedReader:
    return io.BufferedReader(_FullReads(stream), 1 << 17)


def decompressed(stream: IO[bytes], name: str) -> io.BufferedReader:
    """Return the stream without its layers of compression.

    Raises:
        DataError: there are more than four layers.
    """
    inner = stream if _is_file(stream) else _buffered(stream)
    assert isinstance(inner, io.BufferedReader)
    layers = 0
    while (unpack := _unpacker(head_of(inner))) is not None:
        layers += 1
        if layers > MOST_LAYERS:
            raise DataError(f"{name} is compressed more than {MOST_LAYERS} times, one inside the other")
        inner = _buffered(unpack(inner))
    return inner


def head_of(stream: io.BufferedReader) -> bytes:
    """Return the next bytes of a stream without reading them."""
    return stream.peek(HEAD)[:HEAD]


def _unpacker(head: bytes) -> Callable[[Any], Any] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")
    if head.startswith(b"\xfd7zXZ\x00") or re.match(rb"\x5d\0\0.[\0-\x08](?:\xff{8}|.{5}\0{3})", head, re.DOTALL):
        return lzma.LZMAFile
    if re.match(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", head):
        return bz2.BZ2File
    if re.match(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", head):  # a frame, or one to skip
        largest = {int(zstd.DecompressionParameter.window_log_max): 31}  # of `zstd --long=31`
        return lambda stream: zstd.ZstdFile(stream, options=largest)
    return None


def archive_kind(head: bytes) -> Archive | None:
    """Return what archive begins with these bytes."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head[257:262] == b"ustar":
        return "tar"
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")  # checks the sum of a header without a mark
    except (tarfile.HeaderError, ValueError):
        return None
    return "tar"


def members(
    stream: io.BufferedReader, kind: Archive, name: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the stream of each file in an archive, without hidden ones.

    Args:
        stream: the archive.
        kind: what archive it is.
        name: the archive's name.
        wanted: patterns of names; if there are any, only the first file that matches one is yielded.

    Raises:
        DataError: a zip archive is a document, is encrypted, or uses an unknown method; or no file is wanted.
    """
    found = False
    for inside, file in _tar(stream) if kind == "tar" else _zip(stream, name):
        # an archive inside is searched too
        packed = PurePath(inside).suffix.lower() in (".tar", ".zip", ".tgz", ".txz", ".tbz2")
        if hidden(inside) or (wanted and not packed and not any(PurePath(inside).match(each) for each in wanted)):
            continue
        found = True
        yield f"{name}/{inside}", file()
        if wanted:
            return
    if wanted and not found:
        raise DataError(f"{name} contains no file named {' or '.join(wanted)}", "unpack it, and give the file")


def hidden(name: PurePath | str) -> bool:
    """Return whether a file or one of its folders is hidden."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePath(name).parts)


def _tar(stream: io.BufferedReader) -> Iterator[tuple[str, Callable[[], Any]]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise the library keeps every member in memory
            if member.isfile():
                yield member.name, lambda member=member: archive.extractfile(member)  # type: ignore[misc]


def _zip(stream: io.BufferedReader, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    with seekable(stream) as file, zipfile.ZipFile(file) as archive:
        files = [member for member in archive.infolist() if not member.filename.endswith("/")]
        names = [member.filename for member in files]
        if document := _zipped_document(names):
            raise DataError(f"{name} is {document}, which cannot be read as text", "convert it to plain text first")
        for member in files:

            def opened(member: zipfile.ZipInfo = member) -> IO[bytes]:
                if member.flag_bits & 1:
                    raise DataError(f"{name}/{member.filename} is encrypted", "unpack it first")
                try:
                    return archive.open(member)
                except NotImplementedError as error:
                    raise DataError(f"{name}/{member.filename}: {error}", "unpack it first") from error

            yield member.filename, opened


def _zipped_document(names: list[str]) -> str | None:
    """Return what a zip archive is, if it is the form of a document."""
    if "[Content_Types].xml" in names:
        return "an Office document"
    if "mimetype" in names:
        return "an EPUB or OpenDocument file"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays"
    return "a file of PyTorch weights" if any(name.endswith("/data.pkl") for name in names) else None


def _is_file(stream: Any) -> bool:
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO) and stream.seekable()


@contextmanager
def seekable(stream: io.BufferedReader) -> Iterator[IO[bytes]]:
    """Yield the stream itself if it is a seekable file, otherwise a copy of it on disk."""
    if _is_file(stream):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy
