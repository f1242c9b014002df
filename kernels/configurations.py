"""How GPU kernels are launched: the table ``configurations.json``, and which of its rules fits a call.

A table has a list of rules for each operator and width of dtype, ``"qlora_linear 16"``; the first that fits counts. A
rule fits up to ``rows`` rows of x and ``weights`` values of the weight, each without a limit where it is left out.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parent / "configurations.json"
OPERATORS = ("qlora_linear", "qlora_linear_backward")
WAYS = ("direct", "split", "dense", "launches")
# CUDA C++, which serves what cuda.py says and is in no table of the repository before it has run on such a card.
CUDA_WAYS = ("gemv", "gemm", "mma", "dx", "dx_gemm", "encoder")
GEMV_ROWS = 8  # at most
MMA_ROWS = DX_ROWS = 1024  # up to which they are worth measuring: each tile of rows decodes the weight anew
DX_TILES = (16, 32, 64, 128)
DX_GEMM_TILE = 256


@dataclass(frozen=True)
class Configuration:
    """How the kernels of a call are launched.

    way: ``"direct"``, ``"split"`` or ``"dense"``, as triton/qlora_linear.py describes them, or one of CUDA C++: then
        block_rows alone counts, with all but ``"gemv"``. Of an encoder's blocks also ``"launches"``, one after the
        other, each by its own rule.
    block_rows, block_out, block_in: the tile of rows of x, out_features and in_features that is in registers.
    permute: decode by byte permutes in PTX; in float32 only with up to 16 rows.
    programs: with ``"split"``, how many programs there should be, at most, for each multiprocessor.
    parts: of CUDA C++ but for ``"gemv"``: how many blocks of threads share a sum, or with ``"encoder"`` the rows of
        each weight; 0 leaves it to the launcher.
    """

    way: str
    block_rows: int = 0
    block_out: int = 0
    block_in: int = 0
    num_warps: int = 4
    num_stages: int = 3
    permute: bool = True
    programs: int = 2
    parts: int = 0


@dataclass(frozen=True)
class Rule:
    """A configuration and up to which sizes it counts; None is no limit."""

    use: Configuration
    rows: int | None = None
    weights: int | None = None

    def fits(self, rows: int, weights: int) -> bool:
        """Whether a call with ``rows`` rows over ``weights`` values is within its limits."""
        return (self.rows is None or rows <= self.rows) and (self.weights is None or weights <= self.weights)

    def to_json(self) -> dict[str, Any]:
        """The rule as a table's file has it."""
        limits = {"rows": self.rows, "weights": self.weights}
        return {name: limit for name, limit in limits.items() if limit is not None} | {"use": asdict(self.use)}


Table = Mapping[str, tuple[Rule, ...]]


def read(table: Mapping[str, Any]) -> Table:
    """A target's table from its JSON. Raises: ValueError that says what is wrong with it."""
    found = {}
    for title, rules in table.items():
        try:
            found[title] = tuple(Rule(**{**rule, "use": Configuration(**rule["use"])}) for rule in rules)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the rules of {title} are damaged ({error})") from error
        if not found[title] or not found[title][-1].fits(2**62, 2**62) or found[title][-1].use.way in CUDA_WAYS:
            raise ValueError(f"the last rule of {title} must have no limit, of sizes or of what its way serves")
        if any(rule.use.way not in (*WAYS, *CUDA_WAYS) for rule in found[title]):
            raise ValueError(f"each way of {title} must be one of {(*WAYS, *CUDA_WAYS)}")
    return found


@cache
def tables() -> dict[str, Table]:
    """The repository's tables by target: ``sm_80``, ``sm_90`` and ``sm_100``."""
    targets = json.loads(FILE.read_text(encoding="utf-8"))["targets"]
    return {name: read(targets[given] if isinstance(given, str) else given) for name, given in targets.items()}


def target(capability: tuple[int, int]) -> str:
    """Whose table a GPU of such a compute capability takes.

    GPUs of 12.x have neither the tensor cores' memory nor the shared memory of 10.x, but what 8.x has.
    """
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_80")


@cache
def fingerprint() -> str:
    """What tells one version of Triton's kernels and compiler from another, for which a measured table counts."""
    digest = hashlib.sha256()
    for path in sorted((FILE.parent / "triton").glob("*.py")):
        digest.update(path.read_bytes())
    try:
        digest.update(version("triton").encode())
    except PackageNotFoundError:
        return ""
    return digest.hexdigest()[:16]


def candidates(operator: str, dtype: torch.dtype, rows: int) -> list[Configuration]:
    """What ``harlora doctor --tune`` measures against each other for ``rows`` of x: tiles of about that many rows.

    Which of them spill registers depends on the GPU and is seen there.
    """
    near = max(16, 1 << (rows - 1).bit_length())
    heights = [height for height in (16, 32, 64, 128, 256) if near / 4 <= height <= near or 128 <= height < near]
    found = []
    if dtype.itemsize == 2:
        widths = (64, 128) if operator == "qlora_linear" else (32, 64, 128)
        tiles = [(height, width, 64, 8 if height * width >= 64 * 128 else 4) for height in heights for width in widths]
    else:
        tiles = [(min(height, 64), width, 32, 4) for height in heights for width in (32, 64)]
    for height, width, depth, warps in dict.fromkeys(tiles):
        for stages in (3, 5) if rows <= 32 else (3,):
            found.append(Configuration("direct", height, width, depth, warps, stages))
            found += [Configuration("split", height, width, depth, warps, stages, programs=n) for n in (1, 2, 4)]
    if dtype.itemsize == 2 and operator == "qlora_linear":
        found += [Configuration("gemv")] if rows <= GEMV_ROWS else []
        found += [Configuration("gemm", tile) for tile in (64, 128, 256) if tile <= 2 * rows]
        if rows <= MMA_ROWS:
            found += [Configuration("mma", height) for height in heights if height <= 128]
    if dtype.itemsize == 2 and operator == "qlora_linear_backward" and rows <= DX_ROWS:
        found += [Configuration("dx", tile) for tile in DX_TILES if tile in heights]
    if dtype.itemsize == 2 and operator == "qlora_linear_backward" and 2 * rows >= DX_GEMM_TILE:
        found.append(Configuration("dx_gemm", DX_GEMM_TILE))
    return [*found, Configuration("dense")] if rows >= 64 else found


# Likewise for an encoder's blocks, for any number of rows.
ENCODER_CANDIDATES = (
    Configuration("launches"),
    *(Configuration("encoder", tile, parts=parts) for tile in (16, 32, 64) for parts in (0, 1, 2, 4, 8)),
)


def choose(
    table: Table,
    operator: str,
    dtype: torch.dtype,
    rows: int,
    weights: int,
    can: Callable[[Configuration], bool] | None = None,
) -> Configuration:
    """The configuration of the first rule that fits.

    can: whether a configuration of CUDA C++ serves and is fast; by default none is.
    """
    rules = table[f"{operator} {8 * dtype.itemsize}"]
    return next(
        rule.use
        for rule in rules
        if rule.fits(rows, weights) and (rule.use.way in WAYS or (can is not None and can(rule.use)))
    )


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 in TF32 on GPUs, by whichever of its two interfaces that was said."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # reading the older name raises once the newer was set
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)
