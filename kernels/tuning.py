"""A user's own dispatch table for a device, measured by ``harlora doctor --tune``; this file only reads it.

``HARLORA_TUNING`` names another file than ``harlora/tuning.json`` in the user's cache folder; 0 switches it off. A
table counts only for the device and the very extension it was measured with, its configurations of Triton's kernels
only for the very kernels and compiler. ``HARLORA_BACKEND`` and ``HARLORA_CPU`` come before it.
"""

import hashlib
import json
import os
import platform
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harlora.kernels import configurations

ENVIRONMENT = "HARLORA_TUNING"
FORMAT = 1


def path() -> Path | None:
    """The file of the tables, or None where they are switched off, or the user has no home for them."""
    named = os.environ.get(ENVIRONMENT, "")
    if named:
        return None if named == "0" else Path(named)
    try:
        cache_folder = os.environ.get("HARLORA_CACHE") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "harlora"
        )
    except RuntimeError:
        return None
    return Path(cache_folder) / "tuning.json"


@cache
def device_name(device_type: str, index: int | None = None) -> str:
    """What a table is filed under: the model of the processor or of the GPU, by default the current one."""
    if device_type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(index)}"
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    told = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"cpu: {name}, family {told.get('cpu family', '-')}, model {told.get('model', '-')}"


@cache
def build(extension: Path | None) -> str:
    """What tells one build of the extension from another; empty without one."""
    return "" if extension is None else hashlib.sha256(extension.read_bytes()).hexdigest()[:16]


def read(file: Path | None) -> dict[str, Any]:
    """All tables of a file by device name; nothing if there is none or they are switched off.

    Raises: ValueError that says what is wrong with the file.
    """
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("devices"), dict):
        raise ValueError(f"{file} is no table of this version")
    for table in content["devices"].values():
        order = table.get("order") if isinstance(table, dict) else None
        names = [*order.values()] if isinstance(order, dict) else [None]
        if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names):
            raise ValueError(f"{file} is damaged")
        try:
            configurations.read(table.get("configurations", {}))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    devices: dict[str, Any] = content["devices"]
    return devices


def _measured(name: str) -> dict[str, Any]:
    """What was measured on the device of that name; a file that cannot be used is warned of once."""
    try:
        found: dict[str, Any] = read(path()).get(name, {})
    except ValueError as error:
        warnings.warn(
            f"harlora: {error} and is not used; delete it, or measure anew with `harlora doctor --tune`",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    return found


@cache
def table(device_type: str, extension: Path | None) -> dict[str, Any]:
    """The table of a device for this build, or an empty one; a file that cannot be used is warned of once."""
    found = _measured(device_name(device_type))
    return found if found.get("build") == build(extension) else {}


@cache
def measured_configurations(device: torch.device) -> configurations.Table:
    """The rules measured on a device of this model for the very kernels, or none."""
    found = _measured(device_name(device.type, device.index))
    if "configurations" not in found or found.get("triton") != configurations.fingerprint():
        return {}
    return configurations.read(found["configurations"])
