"""Run directories: one folder a run, named by a hash of all that decides its result, finished or resumable."""

import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harlora.errors import InputError
from harlora.files import content_hash, read_json, remove_unfinished, write_json

CONFIG, METRICS, STATE, LOCK = "config.json", "metrics.json", "state.safetensors", ".lock"
_REMEDY = "delete the folder, the run begins anew"


@dataclass(frozen=True)
class Run:
    """One run: ``folder`` has config.json at once, state.safetensors while it trains, metrics.json when finished."""

    folder: Path
    identity: str

    @classmethod
    def existing(cls, root: Path, name: str, config: dict[str, Any]) -> "Run":
        """The run with this configuration that another process has opened."""
        identity = identify(config)
        return cls(root / f"{name}-{identity}", identity)

    @property
    def state_file(self) -> Path:
        """The training state of an unfinished run."""
        return self.folder / STATE

    def metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run, or None."""
        file = self.folder / METRICS
        if not file.exists():
            return None
        metrics: dict[str, Any] = read_json(file, _REMEDY)
        return metrics

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which marks the run as finished, and drop the training state."""
        write_json(self.folder / METRICS, metrics)
        self.state_file.unlink(missing_ok=True)


def identify(config: dict[str, Any]) -> str:
    """The identity of the run with this configuration.

    config: everything that decides the result, as JSON values, fingerprints of the data included. The version of
    harlora is added; whoever changes the code between versions deletes the runs that it touches.
    """
    return content_hash({**config, "harlora": _version("harlora")})


@contextmanager
def open_run(root: Path, name: str, config: dict[str, Any]) -> Iterator[Run]:
    """The run with this configuration under ``root``, new or from before, for this process alone.

    Another process that has it open is waited for; what that finished is then found. A process that ends in any way
    gives it free.

    config: as in `identify`.
    Raises: InputError if the folder is of another run or cannot be written.
    """
    _source()
    identity = identify(config)
    config = {**config, "harlora": _version("harlora")}
    folder = root / f"{name}-{identity}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder} ({error}); choose another with --out") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_unfinished(folder)
        yield _checked(folder, config, identity)


def _checked(folder: Path, config: dict[str, Any], identity: str) -> Run:
    if (folder / CONFIG).exists():
        if content_hash(read_json(folder / CONFIG, _REMEDY)) != identity:
            raise InputError(f"{folder / CONFIG}: was changed after the run began; {_REMEDY}")
    else:
        try:
            write_json(folder / CONFIG, config)
        except OSError as error:
            raise InputError(f"cannot write the run folder {folder} ({error}); choose another with --out") from error
    return Run(folder, identity)


def _git(*arguments: str) -> str | None:
    # The checkout that this code is in, wherever it was started; None when harlora was installed from a wheel.
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def _source() -> dict[str, Any]:
    """The commit that runs; what is committed while it does is another."""
    if _git("ls-files", "--error-unmatch", Path(__file__).resolve().name) is None:  # within another's repository
        return {"commit": None, "dirty": None}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was made."""
    cuda = device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **_source(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("harlora", "torch", "numpy", "scipy", "scikit-learn")},
        },
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
