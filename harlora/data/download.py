"""Fetching the authors' archives: whole and checked or not at all; an interrupted download goes on where it stopped."""

import fcntl
import hashlib
import ipaddress
import lzma
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import quote, urlsplit

from harlora.data.catalog import DATASETS, Dataset, dataset
from harlora.errors import InputError
from harlora.files import read_json, write_json, write_text

MIRROR_VARIABLE = "HARLORA_MIRROR"

Report = Callable[[str, int, int | None], None]
"""Takes what is being done, the bytes done, and all bytes or None where nobody knows."""

_BLOCK = 1 << 18
_SIGNATURE = b"PK"  # how every zip archive begins
_FURTHER = 1 << 20  # bytes gained that make a try count as a success
_LONGEST_PAUSE_S = 60.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP states that another try may not meet again
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    timeout_s: without a single byte. slow_s: over that time, fewer than ``slow_bytes`` are a stall.
    tries: in a row without getting 1 MiB further. pause_s: before the second try; doubles with each, up to a minute.
    """

    timeout_s: float = 30.0
    slow_s: float = 60.0
    slow_bytes: int = 1 << 16
    tries: int = 5
    pause_s: float = 1.0


class _FailedError(Exception):
    """It cannot be fetched; trying again is of no use."""


class _DamagedError(_FailedError):
    """What came is not the archive, so nothing of it is kept."""


class _PassingError(Exception):
    """Another try may help; ``wait_s`` is how long the server asked to be left alone."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def wanted(names: tuple[str, ...]) -> tuple[list[Dataset], list[str]]:
    """The datasets to fetch, and the names of those that ``all`` leaves out because they are the same people.

    names: of datasets, or ``all`` for the first one of each domain.
    Raises: InputError if there is none, or one is unknown or synthetic.
    """
    real = [entry for entry in DATASETS.values() if not entry.is_synthetic]
    if not names:
        raise InputError(f"name a dataset to fetch: {', '.join(entry.name for entry in real)}, or all")
    chosen: dict[str, Dataset] = {}
    for name in names:
        if name == "all":
            first = {entry.domain: entry for entry in reversed(real)}
            chosen |= {entry.name: entry for entry in real if entry is first[entry.domain]}
        elif dataset(name).is_synthetic:
            raise InputError(f"{name} is made on the fly; there is nothing to fetch")
        else:
            chosen[name] = dataset(name)
    return list(chosen.values()), [entry.name for entry in real if "all" in names and entry.name not in chosen]


def source(entry: Dataset, mirror: str | None) -> str | Path:
    """Where an archive comes from: the authors' address, or its address or file in a mirror.

    mirror: a folder or http(s) address laid out as a data root: the dataset's folder, in it the file of the same name.
    Raises: InputError if the mirror is neither, or the authors' address is not https.
    """
    if not mirror:
        address = urlsplit(entry.download)
        if address.scheme != "https" and not (address.scheme == "http" and _is_loopback(address.hostname)):
            raise InputError(
                f"{entry.name}: {entry.download} is not an https address; fetch it by other means and put the file "
                f"into the folder {entry.folder} of the data root, or name a mirror with --mirror"
            )
        return entry.download
    if "://" in mirror:
        if urlsplit(mirror).scheme not in ("http", "https") or not urlsplit(mirror).hostname:
            raise InputError(f"the mirror must be a folder or an http(s) address, got {mirror!r}")
        return f"{mirror.rstrip('/')}/{quote(entry.folder)}/{quote(entry.file)}"
    if not Path(mirror).is_dir():
        raise InputError(
            f"the mirror {mirror!r} (--mirror or {MIRROR_VARIABLE}) is neither a folder nor an http(s) address; "
            "correct or unset it"
        )
    return Path(mirror) / entry.folder / entry.file


def present(entry: Dataset, root: Path, report: Report = lambda *_: None) -> str | None:
    """A sentence about what of a dataset is under ``root`` already and was found in order, or None.

    Checked is a file of the authors' name; what the user put there under another name or extracted is taken as it is.
    Raises: InputError if the file is damaged, is not the published one, or has changed since it was fetched.
    """
    found = entry.find(root)
    if found is None:
        return None
    target = entry.target(root)
    if found != target:
        return f"{entry.name}: {found} is there and is used; fetched nothing"
    try:
        came = _check(entry, target, report)
    except _DamagedError as error:
        raise InputError(f"{target}: {error}; --force fetches it again") from error
    before = _recorded(target)
    if entry.checksum is None and before not in (None, came):
        raise InputError(
            f"{target}: changed since it was fetched ({before} was recorded, it has {came}); --force fetches it "
            f"again; if the change was meant, delete {_record(target)}"
        )
    return f"{entry.name}: {target} is there and in order; fetched nothing"


def download(
    entry: Dataset,
    root: Path,
    *,
    mirror: str | None = None,
    patience: Patience = Patience(),
    report: Report = lambda *_: None,
) -> str:
    """A sentence about the archive that was fetched into the dataset's folder under ``root``, in place of one there.

    Until it is whole and checked it is a file ``.part`` beside; that stays when the download is interrupted, with what
    identifies the server's file in ``.part.json``, and the next download goes on from it. Proxies are those of the
    environment (``https_proxy``, ``http_proxy``, ``no_proxy``). Without a published checksum the SHA-256 is recorded
    beside the archive.

    Raises: InputError that says from where, what happened and where to put the file by hand, if it cannot be fetched.
    """
    origin = source(entry, mirror)
    target = entry.target(root)
    part = target.with_name(target.name + ".part")
    state = part.with_name(part.name + ".json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            try:
                if isinstance(origin, Path):
                    _copy(origin, file, report)
                else:
                    _Transfer(entry, origin, file, state, patience, report).run()
                file.flush()
                os.fsync(file.fileno())
                came = _check(entry, part, report)
            except BaseException as error:
                if isinstance(error, _DamagedError) or part.stat().st_size == 0:
                    part.unlink()
                    state.unlink(missing_ok=True)
                raise
            before = _recorded(target)
            os.replace(part, target)
            state.unlink(missing_ok=True)
            if entry.checksum is None:
                write_text(_record(target), f"{came.partition(':')[2]}  {target.name}\n")
    except (_FailedError, OSError) as error:
        raise InputError(
            f"{entry.name}: not fetched from {origin}: {error}; try again later, or get that file by other means and "
            f"put it into {target.parent}, or name a mirror with --mirror"
        ) from error
    said = f"{entry.name}: {target}, {size_text(target.stat().st_size)}, "
    if entry.checksum is not None:
        return said + "with the published checksum"
    if before not in (None, came):
        return said + f"{came}, DIFFERS from what was fetched before ({before})"
    return said + f"{came} (recorded; none is published)"


def size_text(size: int | None) -> str:
    """A number of bytes as people write it."""
    if size is None:
        return "size unknown"
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """The file ``part``, made if need be, for this process alone: two that append to one file would ruin it."""
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _FailedError(f"another process is fetching {part}") from error
        # The other process may have renamed the file between opening and locking.
        if not (part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat())):
            raise _FailedError(f"another process has just fetched {part}")
        yield file


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _clear(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _require_size(entry: Dataset, size: int) -> None:
    if entry.size is not None and size != entry.size:
        raise _DamagedError(f"required {entry.size:,} bytes, came {size:,}")


def _require_space(file: BinaryIO, size: int) -> None:
    free = shutil.disk_usage(file.fileno()).free
    if size > free:
        raise _FailedError(f"required {size_text(size)} of disk space, free are {size_text(free)}")


def _copy(origin: Path, file: BinaryIO, report: Report) -> None:
    size = origin.stat().st_size
    _clear(file)
    _require_space(file, size)
    with origin.open("rb") as opened:
        while block := opened.read(_BLOCK):
            file.write(block)
            report("copying", file.tell(), size)


@dataclass
class _Transfer:
    """One file from one address into ``file``, which may hold a part; ``state`` keeps which version that is of."""

    entry: Dataset
    address: str
    file: BinaryIO
    state: Path
    patience: Patience
    report: Report

    def run(self) -> None:
        """Fetch all of it, in as many tries as it takes while they get further."""
        opener = urllib.request.build_opener(_Redirects, _Answers)
        furthest, failures = _size(self.file), 0
        while True:
            try:
                return self._try(opener)
            except _PassingError as error:
                if (size := _size(self.file)) >= furthest + _FURTHER:
                    furthest, failures = size, 0
                failures += 1
                if failures >= self.patience.tries:
                    raise _FailedError(f"{error} (tried {failures} times)") from error
                self.report(f"{error}; waiting to try again", size, self.entry.size)
                pause = max(self.patience.pause_s * 2 ** (failures - 1), error.wait_s)
                time.sleep(min(pause, _LONGEST_PAUSE_S))

    def _try(self, opener: urllib.request.OpenerDirector) -> None:
        """Fetch what is missing by one request; all of it, unless the part is known to be of the same version."""
        start = _size(self.file)
        validator = self._known_validator() if start else None
        request = urllib.request.Request(self.address, headers={"User-Agent": "harlora"})
        if validator:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", validator)
        with _open(opener, request, self.patience) as response:
            headers = response.headers
            if response.status == 416 and headers.get("Content-Range") == f"bytes */{start}":
                return  # it had come whole
            if response.status in (206, 416):
                span = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
                if span is None or int(span[1]) != start or _validator(headers) not in ("", validator):
                    _clear(self.file)
                    raise _PassingError("the server's file is not the one of which a part is here")
                total = None if span[2] == "*" else int(span[2])
            else:
                if response.status != 200:
                    raise _FailedError(f"HTTP {response.status} {response.reason}")
                start, total = 0, response.length
                _clear(self.file)
                write_json(self.state, {"address": self.address, "validator": _validator(headers)})
            if headers.get("Content-Encoding", "identity") != "identity":
                raise _DamagedError(f"it came encoded ({headers['Content-Encoding']}), which was not asked for")
            if total is not None:
                _require_size(self.entry, total)
                _require_space(self.file, total - start)
            done = self.file.seek(start)
            blocks = _blocks(response, None if total is None else total - start, self.patience)
            for block in blocks:
                if done == 0 and block != _SIGNATURE:
                    begins = block + next(blocks, b"")[:60]
                    raise _DamagedError(
                        f"required a zip archive, came {headers.get_content_type()} that begins with {begins!r}"
                    )
                self.file.write(block)
                done += len(block)
                self.report("fetching", done, total)
        if total is not None and done < total:
            raise _PassingError(f"the connection ended after {done:,} of {total:,} bytes")

    def _known_validator(self) -> str | None:
        """The validator under which the part was fetched from this address, or None."""
        try:
            known = read_json(self.state, "")
        except InputError:
            return None
        if not isinstance(known, dict) or known.get("address") != self.address:
            return None
        return str(known.get("validator") or "") or None


def _validator(headers: Message) -> str:
    """What identifies this version of the file to the server, or an empty string; weak ETags do not for ranges."""
    etag = str(headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(headers.get("Last-Modified", ""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted connection to one that is not."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            fp.close()
            raise _FailedError(f"refused a redirect from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


class _Answers(urllib.request.HTTPErrorProcessor):
    """Takes 416 (nothing is left of the range) for an answer and not for an error."""

    def http_response(self, request: urllib.request.Request, response: HTTPResponse) -> HTTPResponse:
        return response if response.status == 416 else super().http_response(request, response)

    https_response = http_response


def _open(opener: urllib.request.OpenerDirector, request: urllib.request.Request, patience: Patience) -> HTTPResponse:
    try:
        response: HTTPResponse = opener.open(request, timeout=patience.timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        what = f"HTTP {error.code} {error.reason}"
        if error.code in _PASSING:
            after = error.headers.get("Retry-After", "")
            raise _PassingError(what, float(after) if after.isdecimal() else 0.0) from error
        raise _FailedError(what) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        unknown_name = isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
        if unknown_name or isinstance(reason, ValueError):  # of which errors of TLS certificates are some
            raise _FailedError(str(reason)) from error
        raise _PassingError(_named(reason, patience)) from error
    return response


def _blocks(response: HTTPResponse, size: int | None, patience: Patience) -> Iterator[bytes]:
    """The body as it comes, up to ``size`` bytes: first as many as the signature of a zip archive, if there are."""
    read: Callable[[int], bytes] = response.read
    got, most = 0, len(_SIGNATURE)
    since, before = time.monotonic(), 0
    while got != size:
        try:
            block = read(most if size is None else min(most, size - got))
        except (OSError, HTTPException) as error:
            raise _PassingError(_named(error, patience)) from error
        if not block:
            return
        yield block
        read, most = response.read1, _BLOCK  # which returns what is there instead of waiting for more
        got += len(block)
        if (now := time.monotonic()) - since >= patience.slow_s:
            if got - before < patience.slow_bytes:
                raise _PassingError(f"only {got - before:,} bytes came in {now - since:.0f} s")
            since, before = now, got


def _named(error: object, patience: Patience) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {patience.timeout_s:g} s"
    return str(error) or type(error).__name__


def _check(entry: Dataset, path: Path, report: Report) -> str:
    """The checksum of a file that is the dataset's archive as far as can be told, ``sha256:`` or ``git:`` before it.

    Where no checksum vouches for the contents, published or recorded, those of the zip archive's members do.
    """
    size = path.stat().st_size
    _require_size(entry, size)
    report("checking", 0, size)
    kind = "sha256" if entry.checksum is None else entry.checksum.partition(":")[0]
    came = f"{kind}:{_digest(path, kind)}"
    if entry.checksum not in (None, came):
        raise _DamagedError(f"required the published checksum {entry.checksum}, came {came}")
    try:
        with zipfile.ZipFile(path) as archive:
            if came not in (entry.checksum, _recorded(path)):
                for info in archive.infolist():
                    with archive.open(info) as member:
                        while member.read(_BLOCK):
                            pass
                    report("checking", min(info.header_offset + info.compress_size, size), size)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        raise _DamagedError(f"not a complete zip archive ({error})") from error
    report("checking", size, size)
    return came


def _digest(path: Path, kind: str) -> str:
    """The digest of a file in hexadecimal. kind: sha256, or git for the name that git gives the file's content."""
    with path.open("rb") as file:
        if kind == "git":
            start = b"blob %d\0" % path.stat().st_size
            return hashlib.file_digest(file, lambda: hashlib.sha1(start, usedforsecurity=False)).hexdigest()
        return hashlib.file_digest(file, kind).hexdigest()


def _record(target: Path) -> Path:
    """Where the SHA-256 of a fetched file is kept, in the form of ``sha256sum``."""
    return target.with_name(target.name + ".sha256")


def _recorded(target: Path) -> str | None:
    try:
        return "sha256:" + _record(target).read_text(encoding="utf-8", errors="replace").split()[0]
    except (FileNotFoundError, IndexError):
        return None
