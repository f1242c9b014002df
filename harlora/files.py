"""Files that are either whole or not there: atomic writes, and safetensors files that carry a checksum."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harlora.errors import InputError

_UNFINISHED = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    What a process leaves that is killed within has another ending, so that nobody takes it for such a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give the result the mode that the user's umask asks for.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left in ``folder`` that were killed while they wrote; none may be writing there."""
    for left in folder.glob(f".*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file.

    Raises: InputError that names the file and ends in ``remedy`` if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); {remedy}") from error


def content_hash(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``value`` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_checksum(kind: str, info: str) -> str:
    return hashlib.sha256(json.dumps([kind, info]).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, kind: str, info: Any) -> None:
    """Write tensors and JSON ``info`` to one safetensors file, each with a checksum, whole or not at all.

    kind: what the file is, for example ``"checkpoint"``; `load_tensors` refuses another one.
    Raises: OSError if it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(info, allow_nan=False)
    metadata = {
        "harlora.kind": kind,
        "harlora.info": text,
        "harlora.info_sha256": _header_checksum(kind, text),
        "harlora.sha256": _checksum(whole),
    }
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:  # as which a full disk comes
            raise OSError(str(error)) from error


@contextmanager
def _opened(path: Path, kind: str, remedy: str) -> Iterator[tuple[Any, dict[str, str], Any]]:
    """A safetensors file of ``kind``, its metadata and its info."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("harlora.kind") != kind:
                found = metadata.get("harlora.kind", "a safetensors file of another program")
                raise InputError(f"{path}: required a harlora {kind} file, found {found}; {remedy}")
            text = metadata.get("harlora.info")
            if text is None:
                raise InputError(f"{path}: has no harlora.info in its header, the file is damaged; {remedy}")
            # Files of earlier versions have no checksum of the header.
            if metadata.get("harlora.info_sha256", found := _header_checksum(kind, text)) != found:
                raise InputError(f"{path}: checksum does not match its header, the file is damaged; {remedy}")
            yield file, metadata, json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); {remedy}") from error


def read_info(path: Path, *, kind: str, remedy: str) -> Any:
    """The info alone of a file that `save_tensors` wrote; its tensors are neither read nor checked.

    Raises: InputError that names the file and ends in ``remedy`` if it is missing, no such file, or of another kind, or
    the info is damaged.
    """
    with _opened(path, kind, remedy) as (_, _, info):
        return info


def load_tensors(path: Path, *, kind: str, remedy: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and the info of a file that `save_tensors` wrote.

    Raises: InputError that names the file and ends in ``remedy`` if it is missing, damaged, or of another kind.
    """
    with _opened(path, kind, remedy) as (file, metadata, info):
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    if metadata.get("harlora.sha256") != _checksum(tensors):
        raise InputError(f"{path}: checksum does not match its contents, the file is damaged; {remedy}")
    return tensors, info
