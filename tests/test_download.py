"""Fetching archives from a server of this process: interrupted, slow, changed, wrong. No other host is contacted."""

import contextlib
import errno
import hashlib
import http.client
import io
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from harlora import cli
from harlora.data import catalog
from harlora.data.download import Patience, download, present, source, wanted
from harlora.errors import InputError

PATIENCE = Patience(timeout_s=20, slow_s=20, tries=3, pause_s=0.01)
NAME = "a+file.zip"  # as in UCI's addresses, where + is no space


def archive(seed=0, size=400_000):
    """A zip archive whose bytes do not compress."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        for name in ("one.csv", "two.csv"):
            made.writestr(zipfile.ZipInfo(name), random.Random(f"{seed}{name}").randbytes(size // 2))
    return content.getvalue()


class Site:
    """What the server has and does. ``script`` holds what it does with the next requests, otherwise it serves."""

    def __init__(self):
        self.content = archive()
        self.etag, self.modified = '"one"', None
        self.ranges = True
        self.kind = "application/zip"
        self.script = deque()
        self.requests = []
        self.over = threading.Event()

    def serve(self, handler, *, until=None, stall=False, pace=None):
        """Send the file or the part that was asked for; only up to byte ``until``, or byte by byte."""
        start, state = 0, 200
        asked = handler.headers.get("Range")
        if self.ranges and asked and handler.headers.get("If-Range") in (None, self.etag, self.modified):
            start, state = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        if start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(state)
        if state == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        for name, value in (("ETag", self.etag), ("Last-Modified", self.modified), ("Content-Type", self.kind)):
            if value:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.content) - start))
        handler.end_headers()
        body = self.content[start:until]
        if pace is None:
            handler.wfile.write(body)
        else:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                if self.over.wait(pace):
                    return
        if stall:
            handler.wfile.flush()
            self.over.wait()


def answer(state, **headers):
    def act(handler):
        handler.send_response(state)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return act


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "harlora_mirror", "harlora_data"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            made.requests.append((self.path, dict(self.headers)))
            self.close_connection = True
            act = made.script.popleft() if made.script else made.serve
            with contextlib.suppress(ConnectionError):
                act(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def entry(site, monkeypatch):
    """MotionSense, at the local server and without a published checksum."""
    made = replace(catalog.DATASETS["motionsense"], download=f"{site.address}/raw/{NAME}", size=None, checksum=None)
    monkeypatch.setitem(catalog.DATASETS, "motionsense", made)
    return made


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def files(root):
    return sorted(path.name for path in (root / "motionsense").iterdir())


def fails(entry, root, *what, **options):
    """Fetching raises one message that has ``what``, and leaves nothing that a reader would take."""
    with pytest.raises(InputError) as raised:
        download(entry, root, **{"patience": PATIENCE, **options})
    said = str(raised.value)
    for part in (*what, f"put it into {root / 'motionsense'}", entry.file if "mirror" in options else entry.download):
        assert part in said
    assert entry.find(root) is None


def ranges(site):
    return [headers.get("Range") for _, headers in site.requests]


def test_a_whole_download_is_recorded(site, entry, root):
    seen = []
    said = download(entry, root, patience=PATIENCE, report=lambda *report: seen.append(report))
    digest = hashlib.sha256(site.content).hexdigest()
    assert digest in said
    assert files(root) == [NAME, f"{NAME}.sha256"]
    assert entry.find(root) == entry.target(root)
    assert entry.target(root).read_bytes() == site.content
    assert (root / "motionsense" / f"{NAME}.sha256").read_text() == f"{digest}  {NAME}\n"
    assert entry.target(root).stat().st_mode & 0o777 == 0o666 & ~umask()
    assert ("fetching", len(site.content), len(site.content)) in seen
    assert seen[-1] == ("checking", len(site.content), len(site.content))
    assert "is there and in order" in present(entry, root)
    assert len(site.requests) == 1


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_interrupted_download_asks_for_the_rest(site, entry, root):
    site.script = deque([lambda handler: site.serve(handler, until=100_000)])
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [None, "bytes=100000-"]
    assert site.requests[1][1]["If-Range"] == '"one"'
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize(("etag", "validator"), [(None, "Thu, 26 Nov 2026 10:00:00 GMT"), ('W/"weak"', None)])
def test_a_later_call_goes_on_where_the_version_can_be_told(site, entry, root, etag, validator):
    site.etag, site.modified = etag, validator
    site.script = deque([lambda handler: site.serve(handler, until=100_000)])
    with pytest.raises(InputError, match="the connection ended after 100,000 of"):
        download(entry, root, patience=replace(PATIENCE, tries=1))
    assert files(root) == [f"{NAME}.part", f"{NAME}.part.json"]
    assert entry.find(root) is None
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [None, "bytes=100000-" if validator else None]
    assert site.requests[1][1].get("If-Range") == validator
    assert entry.target(root).read_bytes() == site.content


def part_of(site, entry, root, until):
    """Leave a part of the file as an interrupted download does."""
    site.script = deque([lambda handler: site.serve(handler, until=until)])
    with pytest.raises(InputError, match="the connection ended"):
        download(entry, root, patience=replace(PATIENCE, tries=1))
    site.requests.clear()


def test_a_server_without_ranges_starts_anew(site, entry, root):
    part_of(site, entry, root, 100_000)
    site.ranges = False
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == ["bytes=100000-"]
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize("honest", [True, False])
def test_a_changed_file_starts_anew(site, entry, root, honest):
    part_of(site, entry, root, 100_000)
    site.content, site.etag = archive(seed=1, size=90_000 if honest else 400_000), '"two"'
    if not honest:  # a server that ignores If-Range sends the rest of another version

        def act(handler):
            handler.headers.replace_header("If-Range", '"two"')
            site.serve(handler)

        site.script = deque([act])
    download(entry, root, patience=PATIENCE)
    assert entry.target(root).read_bytes() == site.content
    assert ranges(site) == (["bytes=100000-"] if honest else ["bytes=100000-", None])


def test_another_address_starts_anew(site, entry, root):
    part_of(site, entry, root, 100_000)
    site.content = archive(seed=1)
    download(replace(entry, download=f"{site.address}/other/{NAME}"), root, patience=PATIENCE)
    assert ranges(site) == [None]
    assert entry.target(root).read_bytes() == site.content


def test_a_wrong_range_starts_anew(site, entry, root):
    part_of(site, entry, root, 100_000)
    site.script = deque([answer(206, ETag='"one"', Content_Range="bytes 5-9/400000")])
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == ["bytes=100000-", None]
    assert entry.target(root).read_bytes() == site.content


def test_a_part_that_is_whole_needs_no_byte(site, entry, root):
    part_of(site, entry, root, 100_000)
    part = root / "motionsense" / f"{NAME}.part"
    part.write_bytes(site.content)
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [f"bytes={len(site.content)}-"]
    assert entry.target(root).read_bytes() == site.content


def test_a_part_longer_than_the_file_starts_anew(site, entry, root):
    part_of(site, entry, root, 100_000)
    part = root / "motionsense" / f"{NAME}.part"
    part.write_bytes(site.content + b"more")
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [f"bytes={len(site.content) + 4}-", None]
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize("state", ["no JSON", "[]", '{"address": 3}'])
def test_a_damaged_state_starts_anew(site, entry, root, state):
    part_of(site, entry, root, 100_000)
    (root / "motionsense" / f"{NAME}.part.json").write_text(state)
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [None]


def test_chunks_without_a_length_that_end_early_are_fetched_again(site, entry, root):
    def chunked(handler, until, end):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (until, site.content[:until]) + end)

    site.script = deque(
        [
            lambda handler: chunked(handler, 100_000, b""),
            lambda handler: chunked(handler, len(site.content), b"0\r\n\r\n"),
        ]
    )
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [None, None]  # without a validator there is nothing to go on from
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_published_checksums(site, entry, root, kind):
    blob = b"blob %d\0" % len(site.content) if kind == "git" else b""
    digest = hashlib.new("sha1" if blob else "sha256", blob + site.content).hexdigest()
    right = replace(entry, checksum=f"{kind}:{digest}", size=len(site.content))
    wrong = replace(entry, checksum=f"{kind}:{'0' * len(digest)}")
    fails(wrong, root, f"required the published checksum {wrong.checksum}", f"came {right.checksum}")
    assert files(root) == []
    assert "with the published checksum" in download(right, root, patience=PATIENCE)
    assert files(root) == [NAME]
    assert "in order" in present(right, root)
    with pytest.raises(InputError, match=r"required the published checksum .* --force fetches it again"):
        present(wrong, root)


def test_a_wrong_size_is_refused_before_it_is_fetched(site, entry, root):
    wrong = replace(entry, size=len(site.content) - 1)
    seen = []
    fails(wrong, root, f"required {wrong.size:,} bytes, came {len(site.content):,}", report=seen.append)
    assert files(root) == []
    assert seen == []


def test_states_of_the_server(site, entry, root):
    site.script = deque([answer(404)])
    fails(entry, root, "HTTP 404 Not Found")
    assert len(site.requests) == 1  # no use in asking again
    assert files(root) == []
    site.script = deque([answer(500)] * 3)
    fails(entry, root, "HTTP 500", "tried 3 times")
    site.script = deque([answer(500), answer(503, Retry_After="0")])
    download(entry, root, patience=PATIENCE)
    assert entry.target(root).read_bytes() == site.content


def test_a_server_that_asks_for_time_gets_it(site, entry, root, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    site.script = deque([answer(503, Retry_After="7"), answer(503, Retry_After="86400"), answer(500), answer(500)])
    download(entry, root, patience=replace(PATIENCE, tries=5, pause_s=1))
    assert slept == [7, 60, 4, 8]


def test_tries_are_counted_anew_after_getting_further(site, entry, root):
    site.content = archive(size=5_000_000)
    stops = [(n + 1) * 1_200_000 for n in range(4)]
    site.script = deque([lambda handler, stop=stop: site.serve(handler, until=stop) for stop in stops])
    download(entry, root, patience=replace(PATIENCE, tries=2))
    assert ranges(site)[1:] == [f"bytes={stop}-" for stop in stops]
    assert entry.target(root).read_bytes() == site.content


def test_a_stalled_server_is_left_and_gone_on_with(site, entry, root):
    site.script = deque([lambda handler: site.serve(handler, until=100_000, stall=True)])
    download(entry, root, patience=replace(PATIENCE, timeout_s=0.8))
    assert ranges(site) == [None, "bytes=100000-"]
    site.script = deque([lambda handler: site.over.wait()] * 3)  # not even headers
    shutil.rmtree(root)
    fails(entry, root, "nothing came for 0.1 s (tried 3 times)", patience=replace(PATIENCE, timeout_s=0.1))


def test_a_trickling_server_is_left(site, entry, root):
    site.script = deque([lambda handler: site.serve(handler, pace=0.02)])
    download(entry, root, patience=replace(PATIENCE, slow_s=0.3))
    (first, second) = ranges(site)
    assert first is None
    assert 2 < int(second.removeprefix("bytes=").removesuffix("-")) < 100
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_archive_is_not_kept(site, entry, root, damage):
    content = bytearray(site.content)
    content[150_000] ^= 1
    site.content = site.content[:300_000] if damage == "truncated" else bytes(content)
    fails(entry, root, "not a complete zip archive")
    assert files(root) == []


def test_a_page_instead_of_an_archive_is_not_kept(site, entry, root):
    site.content, site.kind = b"<!DOCTYPE html><title>Sign in</title>", "text/html; charset=utf-8"
    fails(entry, root, "required a zip archive, came text/html that begins with b'<!DOCTYPE html><title>Sign in")
    site.content = b""
    fails(entry, root, "not a complete zip archive")
    assert files(root) == []


def test_what_came_encoded_is_not_kept(site, entry, root):
    site.script = deque([answer(200, Content_Encoding="gzip")])
    fails(entry, root, "it came encoded (gzip)")


def test_what_is_there_is_checked_and_not_fetched(site, entry, root):
    download(entry, root, patience=PATIENCE)
    other = archive(seed=2)
    entry.target(root).write_bytes(other)
    with pytest.raises(InputError, match=r"changed since it was fetched .*; --force fetches it again"):
        present(entry, root)
    (root / "motionsense" / f"{NAME}.sha256").unlink()
    assert "in order" in present(entry, root)
    entry.target(root).write_bytes(other[:-100])
    with pytest.raises(InputError, match=r"not a complete zip archive .*; --force fetches it again"):
        present(entry, root)
    with pytest.raises(InputError, match="required 5 bytes, came"):
        present(replace(entry, size=5), root)
    assert len(site.requests) == 1
    shutil.rmtree(root)
    assert present(entry, root) is None
    (root / "motionsense").mkdir(parents=True)
    (root / "motionsense" / "mine.zip").write_bytes(b"")
    assert f"{root / 'motionsense' / 'mine.zip'} is there and is used" in present(entry, root)


def test_a_change_of_the_server_is_noticed(site, entry, root):
    download(entry, root, patience=PATIENCE)
    before = hashlib.sha256(site.content).hexdigest()
    site.content, site.etag = archive(seed=3), '"three"'
    assert f"DIFFERS from what was fetched before (sha256:{before})" in download(entry, root, patience=PATIENCE)
    assert entry.target(root).read_bytes() == site.content
    assert "in order" in present(entry, root)
    assert "DIFFERS" not in download(entry, root, patience=PATIENCE)


def test_a_failure_keeps_the_archive_that_was_there(site, entry, root):
    download(entry, root, patience=PATIENCE)
    kept = entry.target(root).read_bytes()
    site.content = b"<html>"
    with pytest.raises(InputError):
        download(entry, root, patience=PATIENCE)
    assert entry.target(root).read_bytes() == kept
    assert "in order" in present(entry, root)


def test_the_authors_archive_is_used_beside_another(site, entry, root):
    (root / "motionsense").mkdir(parents=True)
    (root / "motionsense" / "a first.zip").write_bytes(b"")
    download(entry, root, patience=PATIENCE)
    assert entry.find(root) == entry.target(root)


def test_a_mirror_folder(site, entry, root, tmp_path):
    mirror = tmp_path / "mirror"
    with pytest.raises(InputError, match=r"the mirror '.*mirror' .* is neither a folder nor an http\(s\) address"):
        download(entry, root, mirror=str(mirror))
    (mirror / "motionsense").mkdir(parents=True)
    fails(entry, root, "No such file", mirror=str(mirror))
    (mirror / "motionsense" / NAME).write_bytes(site.content[:-100])
    fails(entry, root, "not a complete zip archive", mirror=str(mirror))
    (mirror / "motionsense" / NAME).write_bytes(site.content)
    fails(replace(entry, size=5), root, "required 5 bytes", mirror=str(mirror))
    download(entry, root, mirror=str(mirror))
    assert entry.target(root).read_bytes() == site.content
    assert site.requests == []


def test_a_mirror_address(site, entry, root):
    download(entry, root, mirror=f"{site.address}/base/", patience=PATIENCE)
    assert [unquote(path) for path, _ in site.requests] == [f"/base/motionsense/{NAME}"]
    for address in ("ftp://127.0.0.1/", "http://"):
        with pytest.raises(InputError, match=r"the mirror must be a folder or an http\(s\) address, got"):
            source(entry, address)


def test_the_proxy_of_the_environment_is_used(site, entry, root, monkeypatch):
    monkeypatch.setenv("http_proxy", site.address)
    download(entry, root, mirror="http://mirror.invalid/base", patience=PATIENCE)
    assert [unquote(path) for path, _ in site.requests] == [f"http://mirror.invalid/base/motionsense/{NAME}"]


def test_only_encrypted_addresses(site, entry, root, monkeypatch):
    with pytest.raises(InputError, match=r"http://example.invalid/a.zip is not an https address"):
        source(replace(entry, download="http://example.invalid/a.zip"), None)
    monkeypatch.setattr(http.client.HTTPSConnection, "connect", http.client.HTTPConnection.connect)
    secret = replace(entry, download=entry.download.replace("http:", "https:"))
    site.script = deque([answer(302, Location=entry.download)])
    fails(secret, root, f"refused a redirect from https to {entry.download}")
    assert len(site.requests) == 1
    site.script = deque([answer(302, Location=secret.download)])
    download(secret, root, patience=PATIENCE)
    assert entry.target(root).read_bytes() == site.content


def test_ranges_survive_redirects(site, entry, root):
    part_of(site, entry, root, 100_000)
    site.script = deque([answer(302, Location=f"{site.address}/elsewhere.zip")])
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == ["bytes=100000-"] * 2
    assert entry.target(root).read_bytes() == site.content


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 3),
        (ssl.SSLCertVerificationError("certificate verify failed: self-signed certificate"), 1),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 3),
    ],
)
def test_connections_that_fail(entry, root, monkeypatch, error, tries):
    called = []

    def connect(*_):
        called.append(1)
        raise error

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    fails(entry, root, error.args[-1])
    assert len(called) == tries
    assert files(root) == []


def test_a_full_disk(site, entry, root, monkeypatch):
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        fails(entry, root, "required 0.4 MB of disk space, free are 0.0 MB")
    assert files(root) == []
    # What no check foresees: a file that cannot grow.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        fails(entry, root, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    site.requests.clear()
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == ["bytes=150000-"]
    assert entry.target(root).read_bytes() == site.content


def test_a_folder_that_cannot_be_made(entry, root):
    root.mkdir()
    (root / "motionsense").write_text("a file")
    fails(entry, root, "File exists")


def test_two_downloads_do_not_write_one_file(site, entry, root):
    tried = threading.Event()

    def act(handler):
        site.serve(handler, until=100_000)
        tried.wait()
        handler.wfile.write(site.content[100_000:])

    site.script = deque([act])
    thread = threading.Thread(target=download, args=(entry, root), kwargs={"patience": PATIENCE})
    thread.start()
    until(lambda: site.requests)
    fails(entry, root, "another process is fetching")
    tried.set()
    thread.join()
    assert entry.target(root).read_bytes() == site.content
    assert len(site.requests) == 1


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_kill_leaves_only_a_part(site, entry, root):
    site.script = deque([lambda handler: site.serve(handler, until=300_000, stall=True)])
    code = (
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from harlora.data.catalog import DATASETS\n"
        "from harlora.data.download import download\n"
        f"entry = replace(DATASETS['motionsense'], download={entry.download!r}, checksum=None)\n"
        f"download(entry, Path({str(root)!r}))\n"
    )
    part = root / "motionsense" / f"{NAME}.part"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until(lambda: process.poll() is not None or (part.exists() and part.stat().st_size > 100_000))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert files(root) == [f"{NAME}.part", f"{NAME}.part.json"]
    assert entry.find(root) is None
    size = part.stat().st_size
    site.requests.clear()
    download(entry, root, patience=PATIENCE)
    assert ranges(site) == [f"bytes={size}-"]
    assert entry.target(root).read_bytes() == site.content


def test_names():
    entries, left_out = wanted(("all",))
    names = [entry.name for entry in entries]
    assert {"motionsense", "uci_hapt", "dsa"} <= set(names)
    assert "uci_har" in left_out
    assert "uci_hapt" not in left_out
    assert len({entry.domain for entry in entries}) == len(entries)
    assert not any(entry.is_synthetic for entry in entries)
    entries, left_out = wanted(("all", "uci_har", "uci_har"))
    assert [entry.name for entry in entries] == [*names, "uci_har"]
    assert "uci_har" not in left_out
    entries, left_out = wanted(("uci_har",))
    assert [entry.name for entry in entries] == ["uci_har"]
    assert left_out == []
    with pytest.raises(InputError, match="name a dataset to fetch: motionsense, uci_hapt, .*or all"):
        wanted(())
    with pytest.raises(InputError, match="synthetic_a is made on the fly"):
        wanted(("synthetic_a",))
    with pytest.raises(InputError, match="unknown dataset 'uci'"):
        wanted(("uci",))


def test_the_catalogue_can_be_fetched():
    for entry in catalog.DATASETS.values():
        if not entry.is_synthetic:
            assert source(entry, None) == entry.download
            assert entry.file.endswith(".zip")
            assert Path(entry.file).name == entry.file


def run(*arguments):
    cli.main(["data", "download", *map(str, arguments)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_command_asks_for_consent(site, entry, root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    said = refused(capsys, "motionsense", "--data", root)
    assert "nothing fetched: there is no terminal to ask; agree to the licences above with --yes" in said.err
    for part in (entry.title, entry.licence, entry.download, "size unknown", str(entry.target(root))):
        assert part in said.out
    for reply in ("n\n", "\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(reply))
        assert "were not agreed to" in refused(capsys, "motionsense", "--data", root).err
    assert site.requests == []
    assert not root.exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    run("motionsense", "--data", root)
    assert "recorded; none is published" in capsys.readouterr().out
    assert entry.target(root).read_bytes() == site.content


def test_the_command_fetches_what_is_not_there(site, entry, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HARLORA_DATA", str(root))
    run("motionsense", "--yes")
    capsys.readouterr()
    run("motionsense")  # nothing to agree to
    assert "is there and in order; fetched nothing" in capsys.readouterr().out
    assert len(site.requests) == 1
    run("motionsense", "--yes", "--force")
    assert len(site.requests) == 2
    monkeypatch.setenv("HARLORA_MIRROR", str(tmp_path))
    assert "No such file" in refused(capsys, "motionsense", "--yes", "--force").err
    run("motionsense", "--yes", "--force", "--mirror", f"{site.address}/base")
    assert unquote(site.requests[-1][0]) == f"/base/motionsense/{NAME}"


def test_the_command_goes_on_after_a_failure(site, entry, root, capsys):
    site.script = deque([answer(404)] * 2)
    mirror = f"{site.address}/base"
    said = refused(capsys, "uci_har", "uci_hapt", "motionsense", "--yes", "--data", root, "--mirror", mirror)
    assert "uci_har: not fetched from" in said.err
    assert "uci_hapt: not fetched from" in said.err
    assert "recorded; none is published" in said.out
    assert entry.target(root).exists()
