"""Reading the authors' own archives: a zip file, a zip inside a zip, or the extracted folder."""

import io
import lzma
import tempfile
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from harlora.errors import InputError

_AGAIN = "download it again"
_BLOCK = 32 << 20  # bytes of a large file that are held at a time
_IN_MEMORY = 64 << 20  # bytes up to which a zip inside a zip is unpacked in memory, beyond in a temporary file


class Archive:
    """The files of a zip archive or of a folder, by their path inside it.

    Resource forks that macOS leaves (``__MACOSX``) are not listed. A member that is itself a zip archive can be
    opened with `nested`.

    Raises: InputError if ``path`` is missing or not a complete zip archive.
    """

    def __init__(self, path: Path, content: IO[bytes] | None = None) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if content is None and path.is_dir():
            names = [entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()]
        else:
            try:
                self._zip = zipfile.ZipFile(path if content is None else content)
            except FileNotFoundError as error:
                raise InputError(f"{path}: no such file") from error
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{path}: not a complete zip archive ({error}); {_AGAIN}") from error
            names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        self.names = sorted(name for name in names if "__MACOSX/" not in name and not name.endswith(".DS_Store"))

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises: InputError if it is not there or damaged.
        """
        with self._open(name) as opened:
            return opened.read()

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a large text file in pieces that end with a line.

        Raises: InputError if it is not there or damaged.
        """
        rest = b""
        for block in self._blocks(name):
            end = block.rfind(b"\n") + 1
            if end:
                yield rest + block[:end]
                rest = block[end:]
            else:
                rest += block
        if rest:
            yield rest

    def nested(self, name: str) -> "Archive":
        """The zip archive that is the member ``name`` of this one."""
        if self._zip is None:
            return Archive(self.path / name)
        unpacked = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115, closed when the archive goes
        for block in self._blocks(name):
            unpacked.write(block)
        try:
            archive = Archive(self.path / name, unpacked)
        except InputError:
            unpacked.close()
            raise
        weakref.finalize(archive, unpacked.close)
        return archive

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._open(name) as opened:
            while block := opened.read(_BLOCK):
                yield block

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with (self.path / name).open("rb") if self._zip is None else self._zip.open(name) as opened:
                yield opened
        except (KeyError, FileNotFoundError) as error:
            raise InputError(f"{self.path}: {name} is missing from it; {_AGAIN}") from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            raise InputError(f"{self.path}: {name} in it is damaged ({error}); {_AGAIN}") from error
        except RuntimeError as error:  # encrypted, or compressed in a way that Python cannot undo
            raise InputError(
                f"{self.path}: {name} in it cannot be unpacked ({error}); {_AGAIN}, or unpack it by other means"
            ) from error

    def numbers(
        self, name: str, *, columns: Sequence[str] | int, delimiter: str | None, header: bool = False
    ) -> np.ndarray:
        """The numbers in a text file, ``(rows, columns)``, float64.

        columns: the number of columns, or the names of those wanted from a file with a header line.
        delimiter: the character between columns, or None for any white space.
        Raises: InputError if a column is missing, a field is not a finite number, or rows differ in length.
        """
        where = f"{self.path}: {name}"
        separator = "white space" if delimiter is None else repr(delimiter)
        content = self.read(name)
        use = None
        if header:
            assert not isinstance(columns, int)
            first = content.split(b"\n", 1)[0].decode("utf-8-sig", "replace").strip()
            found = [column.strip() for column in first.split(delimiter)]
            missing = [column for column in columns if column not in found]
            if missing:
                raise InputError(
                    f"{where}: required columns {', '.join(missing)} are not in its first line, which split at "
                    f"{separator} reads {found[:6]}; is it the right file, with the right separator?"
                )
            use = [found.index(column) for column in columns]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # reported below
                table = np.loadtxt(io.BytesIO(content), delimiter=delimiter, skiprows=int(header), usecols=use, ndmin=2)
        except ValueError as error:
            raise InputError(f"{where}: not a table of numbers separated by {separator} ({error})") from error
        wanted = columns if isinstance(columns, int) else len(columns)
        if table.shape[1] != wanted or not len(table):
            raise InputError(
                f"{where}: required rows of {wanted} numbers separated by {separator}, "
                f"found {len(table)} rows of {table.shape[1]}"
            )
        if not np.isfinite(table).all():
            row = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
            raise InputError(
                f"{where}: row {row + 1 + header} has a value that is not a finite number (NaN or infinite); "
                "repair the file or remove it"
            )
        return table
