"""Reads the machine code of all GPU kernels, for GPUs that are not here: registers, spills, shared memory.

    python bench/compile_report.py [--targets sm_80 sm_90 sm_100] [--only TEXT] [--json FILE]

Needs Triton, whose wheel has the assembler and disassembler, and no GPU. Triton's kernels are compiled as they are
launched for every configuration of the dispatch table (`calls`); those of CUDA C++ are read from the extension as it
was built (`built`). The exit status is 1 if one spills registers, takes more shared memory than the target has, or
multiplies matrices without tensor cores.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: what is interpreted cannot be compiled

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from harlora.kernels import configurations, cpp
from harlora.kernels.configurations import Configuration
from harlora.kernels.triton import encoder, qlora_linear, qlora_mlp, qlora_qkv

# What a thread block may take: the CUDA C++ programming guide, technical specifications. sm_80's table also serves GPUs
# of 8.6, 8.9 and 12.x, which have 99 KiB.
SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QMMA")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int64: "i64",
}  # fmt: skip
# CUDA C++ that is to multiply by them, and how the names of the targets begin for which it does anything.
MATRIX_KERNELS = {
    "qlora_gemv_kernel": "sm_", "lora_down_kernel": "sm_", "qlora_gemm_sm90_kernel": "sm_90", "qlora_mma_kernel": "sm_",
    "encoder_kernel": "sm_", "qlora_dx_kernel": "sm_", "qlora_dx_sm90_kernel": "sm_90",
    "lora_low_kernel": "sm_", "lora_grads_kernel": "sm_",
}  # fmt: skip
META = torch.device("meta")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher asks for it; what decides the machine code."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Outcome:
    """What the machine code of one launch takes and has."""

    target: str
    kernel: str
    where: str
    registers: int
    spills: int  # loads and stores of registers that did not fit
    shared_bytes: int
    tensor_cores: str
    instructions: int
    problems: tuple[str, ...]


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of ``call``, none of which takes place."""
    found: list[Launch] = []

    def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_launch(function, arguments, options))

    with patch.object(JITFunction, "run", run):
        call()
    return found


def _launch(function: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> Launch:
    named = dict(zip(function.arg_names, arguments, strict=False))
    options = {name: value for name, value in given.items() if name not in function.arg_names}
    named |= {name: value for name, value in given.items() if name in function.arg_names}
    constexpr = {parameter.name for parameter in function.params if parameter.is_constexpr}
    unspecialized = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    signature, constants, divisible = {}, {}, []
    for place, name in enumerate(function.arg_names):
        value = named[name]
        special = name not in unspecialized
        if name in constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible.append(place)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                divisible.append(place)
        else:
            signature[name] = "fp32"
    return Launch(
        function.fn.__module__, function.fn.__name__, tuple(signature.items()), tuple(constants.items()),
        tuple(divisible), tuple(options.items()),
    )  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Of one call of the layer; in_features and out_features are the same."""

    rows: int
    width: int
    dtype: torch.dtype
    rank: int = 16
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    dropout: float = 0.0


def _quantized(size: Size, in_features: int, out_features: int) -> tuple[Any, ...]:
    numel = in_features * out_features
    blocks = -(-numel // size.blocksize)
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=META)
    if not size.nested:
        return packed, torch.empty(blocks, device=META), None, None, size.quant_type, size.blocksize
    absmax = torch.empty(blocks, dtype=torch.uint8, device=META)
    nested = torch.empty(-(-blocks // 256), device=META)
    return packed, absmax, nested, torch.empty((), device=META), size.quant_type, size.blocksize


def layer_call(operator: str, size: Size, chosen: Configuration, train_A: bool = True) -> Callable[[], object]:
    """A call of the layer's launcher on tensors without memory; lora_A may be frozen."""
    empty = partial(torch.empty, device=META, dtype=size.dtype)
    A = empty(size.rank, size.width) if size.rank else None
    B = empty(size.width, size.rank) if size.rank else None
    x, bias, t = empty(size.rows, size.width), empty(size.width), empty(size.rows, size.rank)
    quantized = _quantized(size, size.width, size.width)
    launcher: Callable[..., object] = getattr(qlora_linear, operator)
    drop = (size.dropout, torch.empty((), device=META, dtype=torch.int64)) if size.dropout else ()
    if operator == "qlora_linear":
        return partial(launcher, x, *quantized, size.width, bias, A, B, 0.5, *drop, configuration=chosen)
    mask = [True, True, size.rank > 0 and train_A, size.rank > 0]
    return partial(
        launcher, empty(size.rows, size.width), x if train_A else None, t, *quantized, size.width, A, B, 0.5,
        mask, *drop, configuration=chosen,
    )  # fmt: skip


def qkv_call(operator: str, size: Size, chosen: Configuration) -> Callable[[], object]:
    """A call of the launcher of three layers over one x."""
    empty = partial(torch.empty, device=META, dtype=size.dtype)
    A = empty(size.rank, size.width) if size.rank else None
    B = empty(size.width, size.rank) if size.rank else None
    layers: Any = [(*_quantized(size, size.width, size.width), size.width, empty(size.width), A, B, 0.5)] * 3
    x = empty(size.rows, size.width)
    if operator == "qlora_linear":
        return partial(qlora_qkv.qlora_qkv, x, layers, configuration=chosen)
    wanted = (True, True, size.rank > 0, size.rank > 0)
    return partial(
        qlora_qkv.qlora_qkv_backward, [x] * 3, x, empty(3, size.rows, size.rank), layers, wanted, configuration=chosen
    )  # fmt: skip


def mlp_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the launchers of fc1, GELU and fc2, of the sizes of a HAR encoder and the largest."""
    forward: Callable[..., object] = qlora_mlp.qlora_mlp
    backward: Callable[..., object] = qlora_mlp.qlora_mlp_backward
    options: dict[str, Any] = {"configuration": Configuration("direct")}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, width, hidden, rank, blocksize, nested in (
            (16, 192, 512, 16, 64, False),
            (1024, 192, 512, 16, 64, False),
            (16, 192, 512, 0, 64, False),
            (512, 256, 1024, 32, 32, True),
            (2048, 256, 1024, 32, 64, True),
            (4096, 1024, 1024, 32, 256, False),
        ):
            empty = partial(torch.empty, device=META, dtype=dtype)
            size = Size(rows, width, dtype, rank, blocksize=blocksize, nested=nested)
            out = min(width, qlora_mlp.MOST_OUT)
            layers = [
                (
                    *_quantized(size, i, o),
                    o,
                    empty(o),
                    *((empty(rank, i), empty(o, rank)) if rank else (None, None)),
                    0.5,
                )
                for i, o in ((width, hidden), (hidden, out))
            ]
            facts = f"{str(dtype).removeprefix('torch.')}, {rows} rows, {width}→{hidden}→{out}, rank {rank}"
            described = f"{facts}, blocks of {blocksize}{', nested' * nested}"
            x, h, t = empty(rows, width), empty(rows, hidden), empty(rows, rank)
            yield f"qlora_mlp, {described}", partial(forward, x, *layers, True, **options)
            every = [True, *2 * (True, rank > 0, rank > 0)]
            for wanted in (every, [False, *every[1:]], [False, False, rank > 0, False] * 2)[: 3 if rows == 1024 else 1]:
                call = partial(backward, empty(rows, out), x, h, t, t, *layers, wanted[:7], **options)
                yield f"qlora_mlp_backward, {described}, {sum(wanted[:7])} gradients", call


def encoder_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of what an encoder has between its 4-bit layers: the sizes of a HAR encoder, the smallest and largest."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        empty = partial(torch.empty, device=META, dtype=dtype)
        for width in (8, 192, qlora_mlp.MOST_OUT):
            x, norm = empty(64, 16, width), (empty(width), empty(width), 1e-5)
            stats = torch.empty(2, 1024, device=META)
            where = f"encoder's norm, {str(dtype).removeprefix('torch.')}, width {width}"
            for other in (None, x):
                yield where, partial(encoder.residual_norm, x, other, norm, True)
                yield where, partial(encoder.residual_norm_backward, x, x, stats, norm, other)
            yield where, partial(encoder.residual_norm, x, x, norm, False)
        for tokens in (16, 32, encoder.MOST_TOKENS):
            for size in (16, 32, encoder.MOST_HEAD):
                if not encoder.attends(tokens, size, dtype):
                    continue
                qkv = empty(3, 64, tokens, 6 * size)
                where = f"encoder's attention, {str(dtype).removeprefix('torch.')}, {tokens} tokens, heads of {size}"
                yield where, partial(encoder.attention, qkv, 6)
                yield where, partial(encoder.attention_backward, qkv[0], qkv, 6)


def calls(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every configuration of a target's table, in each of its dtypes; and of each way, formats and shapes besides."""
    for dtype in (torch.float32, torch.bfloat16):
        frozen = layer_call("qlora_linear_backward", Size(512, 768, dtype), Configuration("dense"), train_A=False)
        yield f"qlora_linear_backward with lora_A frozen, {str(dtype).removeprefix('torch.')}", frozen
    for title, rules in configurations.tables()[target].items():
        operator, bits = title.split()
        if operator not in configurations.OPERATORS:
            continue  # the launches of an encoder go by the rules of its layers
        dtypes = [torch.float32] if bits == "32" else [torch.bfloat16, torch.float16]
        seen = set()
        for rule in (each for each in rules if each.use.way in configurations.WAYS):
            width = 768 if rule.weights else 4096
            rows = rule.rows or 8192
            # With dropout of a size at which t is fused, where it ever is.
            sizes = [Size(rows, width, dtypes[0]), Size(rows, 192, dtypes[0], dropout=0.1)]
            if rule.use.way != "dense":
                sizes.append(Size(rows, width, dtypes[0], rank=40))  # not fused
            if rule.use.way not in seen:
                seen.add(rule.use.way)
                sizes += [Size(rows, width, dtype) for dtype in dtypes[1:]]
                sizes += [
                    Size(rows, width, dtypes[0], rank=8, quant_type="fp4", nested=True),
                    Size(rows, width + 1, dtypes[0], rank=40, nested=True),
                    Size(rows, 193, dtypes[0], dropout=0.1),
                    Size(rows, width, dtypes[0], rank=128, dropout=0.1),
                ]
                if rule.use.way != "dense":
                    sizes += [
                        Size(rows, width, dtypes[0], rank=128, blocksize=32),
                        Size(rows, width, dtypes[0], rank=0, blocksize=256),
                    ]
            for size in sizes:
                yield _described(title, rule.use, size), layer_call(operator, size, rule.use)
                if rule.use.way == "direct" and size.rank <= qlora_linear.FUSED_RANK and not size.dropout:
                    yield f"three of {_described(title, rule.use, size)}", qkv_call(operator, size, rule.use)


def adapter_calls(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The other families of adapters: kernels of their own, and what they ask of the layer's forward, in each way."""
    from harlora.kernels.triton import dora, lora_pool

    norm: Callable[..., object] = dora.dora_norm
    dora_layer: Callable[..., object] = dora.dora_linear
    pool_layer: Callable[..., object] = lora_pool.lora_pool_linear
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        empty = partial(torch.empty, device=META, dtype=dtype)
        for size in (
            Size(1, 4096, dtype),
            Size(1, 4096, dtype, rank=8, quant_type="fp4", nested=True),
            Size(1, 4097, dtype, rank=32, nested=True),
            Size(1, 4097, dtype, rank=40, nested=True),
            Size(1, 4096, dtype, rank=128, blocksize=32),
        ):
            A, B = empty(size.rank, size.width), empty(size.width, size.rank)
            quantized = _quantized(size, size.width, size.width)
            described = f"{size.width}², rank {size.rank}, {size.quant_type}, blocks of {size.blocksize}"
            yield f"dora_norm, {name}, {described}{', nested' * size.nested}", partial(norm, *quantized, A, B, 0.5)
        rules = configurations.tables()[target][f"qlora_linear {8 * dtype.itemsize}"]
        for chosen in {
            rule.use.way: rule for rule in reversed(rules) if rule.use.way in ("direct", "split")
        }.values():  # one a way
            rows = chosen.rows or 8192
            for rank, width in ((16, 4096), (64, 4097)):
                size = Size(rows, width, dtype, rank=rank)
                x, bias = empty(rows, width), empty(width)
                A, B = empty(rank, width), empty(width, rank)
                layer = (x, *_quantized(size, width, width), width, bias, A, B)
                gain, scaling = torch.empty(width, device=META), torch.empty(8, device=META)
                offsets, index = (torch.empty(n, device=META, dtype=torch.int64) for n in (9, rows))
                yield (
                    _described("dora_linear", chosen.use, size),
                    partial(dora_layer, *layer, 0.5, gain, configuration=chosen.use),
                )
                yield (
                    _described("lora_pool_linear", chosen.use, size),
                    partial(pool_layer, *layer, offsets, index, scaling, configuration=chosen.use),
                )


def _described(title: str, chosen: Configuration, size: Size) -> str:
    tile = f" {chosen.block_rows}×{chosen.block_out}×{chosen.block_in}" if chosen.block_rows else ""
    kind = f"{size.quant_type}, blocks of {size.blocksize}{', nested' * size.nested}{', dropout' * (size.dropout > 0)}"
    dtype = str(size.dtype).removeprefix("torch.")
    return f"{title.split()[0]} {chosen.way}{tile}, {dtype}, {size.rows}×{size.width}², rank {size.rank}, {kind}"


def compiled(target: str, where: str, launch: Launch) -> Outcome:
    """What a launch becomes on a target."""
    function = getattr(import_module(launch.module), launch.kernel)
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.divisible}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
    try:
        kernel = triton.compile(
            source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=dict(launch.options)
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[-1]
        return Outcome(
            target, launch.kernel, where, 0, 0, 0, "", 0, (f"does not compile: {type(error).__name__} {first}",)
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((_, registers, words),) = machine_code(Path(file.name))
    multiplies = bool(re.search(r"\btt\.dot\b", kernel.asm["ttir"]))
    return _judged(target, launch.kernel, where, registers, words, kernel.metadata.shared, multiplies)


def machine_code(cubin: Path) -> Iterator[tuple[str, int, Counter[str]]]:
    """Of each kernel in a file its name, its registers, and how often it has each instruction."""
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin)))
    for section in _tool("nvdisasm", "-c", cubin).split("//--------------------- ")[1:]:
        name = section.split()[0].removeprefix(".text.")
        if name in registers and section.startswith(".text."):
            found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", section, re.MULTILINE)
            yield name, int(registers[name]), Counter(found)


def _judged(
    target: str, kernel: str, where: str, registers: int, words: Counter[str], shared: int, multiplies: bool
) -> Outcome:
    cores = [name for name in TENSOR_CORES if words[name]]
    spills = words["LDL"] + words["STL"]  # not the stack's size: exact division is a call, which has a frame
    problems = []
    if spills:
        problems.append(f"spills registers ({spills} loads and stores)")
    if shared > (most := SHARED_BYTES.get(target, SHARED_BYTES["sm_80"])):
        problems.append(f"takes {shared} bytes of shared memory, {target} has {most}")
    if multiplies and not cores:
        problems.append("multiplies matrices without tensor cores")
    return Outcome(target, kernel, where, registers, spills, shared, "+".join(cores), words.total(), tuple(problems))


def _tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(each) for each in (program, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def built(targets: list[str]) -> list[Outcome]:
    """The kernels of CUDA C++ as they are in the extension of this installation."""
    path = cpp.extension_path()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if path is not None:
            _tool("cuobjdump", "-xelf", "all", path.resolve(), folder=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = cubin.suffixes[-2].lstrip(".").rstrip("a")
            if {"sm_86": "sm_80", "sm_89": "sm_80"}.get(target, target) not in targets:
                continue
            usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
            shared = dict(re.findall(r"Function (\S+):\n.*SHARED:(\d+)", usage))
            for mangled, registers, words in machine_code(cubin):
                name = _demangled(mangled)
                multiplies = any(name.startswith(k) and target.startswith(t) for k, t in MATRIX_KERNELS.items())
                found.append(_judged(target, name, "CUDA C++", registers, words, int(shared[mangled]), multiplies))
    return found


def _demangled(name: str) -> str:
    """A kernel's name without its namespaces and arguments, as far as binutils are here to tell."""
    program = shutil.which("c++filt")
    if program is not None:
        name = subprocess.run([program, name], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(r"(\w+_kernel(?:<[^(]*>)?)\(", name)
    return found[1] if found else name


def jobs(targets: list[str]) -> list[tuple[str, str, Launch]]:
    """What is compiled, each machine code once: target, the first call that needs it, launch."""
    found: dict[tuple[str, Launch], str] = {}
    for target in targets:
        known: dict[str, Any] = {"multiprocessors": lambda _, count=MULTIPROCESSORS[target]: count}
        with patch.multiple(qlora_linear, **known), patch.multiple(qlora_mlp, **known):
            for where, call in calls(target):
                for launch in recorded(call):
                    found.setdefault((target, launch), where)
            for where, call in (*adapter_calls(target), *mlp_calls(), *encoder_calls()):
                for launch in recorded(call):
                    found.setdefault((target, launch), where)
        for call in format_calls():
            for launch in recorded(call):
                found.setdefault((target, launch), "the format")
    return [(target, where, launch) for (target, launch), where in found.items()]


def format_calls() -> Iterator[Callable[[], object]]:
    """Calls of the operators that quantise and dequantise."""
    from harlora.kernels.triton import nf4

    for quant_type in ("nf4", "fp4"):
        weight = torch.empty(768, 768, device=META, dtype=torch.bfloat16)
        yield partial(nf4.quantize_4bit, weight, quant_type, 64, False)
        for nested, width in ((False, 768), (True, 767)):
            size = Size(1, width, torch.bfloat16, quant_type=quant_type, nested=nested)
            quantized = _quantized(size, width, width)
            dequantize: Callable[..., object] = nf4.dequantize_4bit
            yield partial(dequantize, *quantized, (width, width), torch.bfloat16)
            region: Callable[..., object] = nf4.dequantize_region
            yield partial(region, *quantized, width, 0, torch.empty(8, 80, device=META, dtype=torch.bfloat16))
        for nested in (False, True):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for blocksize in (32, 64, 4096):
                    size = Size(1, 4096, dtype, quant_type=quant_type, blocksize=blocksize, nested=nested)
                    quantized = _quantized(size, 8192, 4096)
                    yield partial(dequantize, *quantized, (4096, 8192), dtype)
                    yield partial(region, *quantized, 8192, 4096, torch.empty(4096, 4096, device=META, dtype=dtype))


def main() -> int:
    """Compiles, prints the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(SHARED_BYTES), default=list(SHARED_BYTES))
    parser.add_argument(
        "--only", default="", help="only what is first needed by a call whose description has this text"
    )
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 170)
    work = [job for job in jobs(options.targets) if options.only in job[1]]
    ours = [each for each in built(options.targets) if options.only in each.where]
    if not work and not ours:
        parser.error(f"--only: no call's description has {options.only!r}; without it the table lists all")
    with ProcessPoolExecutor() as pool, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(work))
        outcomes = list(ours)
        for outcome in pool.map(compiled, *zip(*work, strict=True)) if work else ():
            outcomes.append(outcome)
            progress.advance(task)
    table = Table("target", "kernel", "first needed by", "registers", "spills", "shared", "matrix", "instructions")
    for each in outcomes:
        table.add_row(
            each.target, each.kernel, each.where, str(each.registers), str(each.spills),
            str(each.shared_bytes), each.tensor_cores or "-", str(each.instructions),
            style="red" if each.problems else None,
        )  # fmt: skip
    console.print(table)
    failed = [each for each in outcomes if each.problems]
    for each in failed:
        console.print(f"{each.target} {each.kernel}: {'; '.join(each.problems)}\n    {each.where}", highlight=False)
    if not ours and not options.only:
        console.print("the extension has no kernels of CUDA C++: build it where nvcc is")
    counts = f"{len(work)} kernels compiled by Triton {triton.__version__}, {len(ours)} of CUDA C++"
    console.print(f"{counts}; {len(failed)} with a problem")
    if options.json:
        content = {"triton": triton.__version__, "kernels": [asdict(each) for each in outcomes]}
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
