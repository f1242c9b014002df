"""Zip archives and folders that the tests of the readers make, in the authors' form."""

import io
import zipfile

from harlora.data.archive import Archive


def packed(files):
    """The bytes of a zip archive with these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def zipped(path, files):
    """The archive, written to ``path``."""
    path.write_bytes(packed(files))
    return Archive(path)


def extracted(folder, files):
    """The same files in a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Archive(folder)


def stretches(recordings):
    """First and last second of each recording, from the time that its source ends with."""
    spans = []
    for one in recordings:
        start = float(one.source.rsplit("from ", 1)[1].removesuffix(" s"))
        spans.append((start, start + (len(one.accel) - 1) / one.rate_hz))
    return spans
