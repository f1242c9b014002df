"""Counts the instructions of a fixed set of CPU operator calls, and fails where one needs 3 % more than it did.

    python -m harlora.bench.instructions [--update] [--baseline FILE]

A count does not depend on what else the machine does, as times do; it is the same every time to a few in a million. The
calls run under ``valgrind --tool=callgrind``, whose simulated processor has no AVX-512, with the AVX2 kernels and one
thread. Two counts of a call: in the compiled extension, and in all of the process, the way through Python and torch
included. Counts are those of one compiler, torch and Python: with others they are not compared.

Exit status: 0 nothing grew; 1 something grew, or a call is missing; 2 valgrind or the extension is; 3 not comparable.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import harlora
from harlora.errors import InputError
from harlora.files import read_json, write_json
from harlora.kernels import cpp, dispatch, eager
from harlora.models import MAE

BASELINE = Path(__file__).with_name("instructions.json")
GROWTH = 0.03
COUNTS = ("extension", "process")
WARM = 8  # calls before the one that counts: caches are filled, Python has specialised its bytecode
KERNELS = "avx2"

# Starts and stops counting from inside the process. Python and torch are loaded at valgrind's lowest speed loss.
_REQUESTS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""

Counts = dict[str, dict[str, int]]


class Change(NamedTuple):
    """One count of one call against the baseline; None where one side does not have it."""

    call: str
    kind: str
    old: int | None
    new: int | None

    @property
    def growth(self) -> float | None:
        """How much it grew, relatively."""
        return self.new / self.old - 1 if self.old and self.new else None

    @property
    def failed(self) -> bool:
        """Whether it grew too much, or is missing."""
        return self.growth is None or self.growth > GROWTH


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is counted, by name: every operator, few and many rows, forward and backward, a whole encoder."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(192, 768)
    yield "quantize_4bit 192x768", partial(harlora.quantize_4bit, weight)
    yield "quantize_4bit 192x768 nested", partial(harlora.quantize_4bit, weight, double_quant=True)
    for nested in (False, True):
        packed = harlora.quantize_4bit(weight, double_quant=nested)
        yield f"dequantize_4bit 192x768{' nested' * nested}", partial(harlora.dequantize_4bit, packed)
    for in_features, out_features in ((192, 192), (192, 768)):
        quantized = harlora.quantize_4bit(draw(out_features, in_features))
        others = [draw(out_features), draw(16, in_features), draw(out_features, 16)]
        name = f"{in_features}x{out_features}"
        for rows in (1, 8, 64):
            yield f"qlora_linear {name} M={rows}", partial(_layer, draw(rows, in_features), quantized, *others)
        reduced = [tensor.bfloat16() for tensor in others]
        x = draw(64, in_features)
        yield f"qlora_linear {name} M=64 bfloat16", partial(_layer, x.bfloat16(), quantized, *reduced)
        trained = [tensor.requires_grad_() for tensor in (x, *others[1:])]
        y, grad = _layer(x, quantized, *others), draw(64, out_features)
        backward = partial(torch.autograd.grad, y, trained, grad, retain_graph=True)
        yield f"qlora_linear_backward {name} M=64", backward
    yield from _groups(draw)


def _layer(x: torch.Tensor, weight: harlora.QuantizedWeight, *others: torch.Tensor) -> torch.Tensor:
    bias, lora_A, lora_B = others
    return harlora.qlora_linear(x, weight, bias, lora_A, lora_B)


def _groups(draw: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    def described(in_features: int, out_features: int) -> eager.Layer:
        packed = harlora.quantize_4bit(draw(out_features, in_features))
        lora_A, lora_B = draw(16, in_features).requires_grad_(), draw(out_features, 16).requires_grad_()
        bias = draw(out_features)
        return packed.packed, packed.absmax, None, None, "nf4", 64, out_features, bias, lora_A, lora_B, 1.0

    def both(compute: Callable[[], Any], inputs: list[torch.Tensor | None]) -> object:
        results = compute()
        sums = [y.sum() for y in (results if isinstance(results, tuple) else (results,))]
        return torch.autograd.grad(sums, [tensor for tensor in inputs if tensor is not None])

    x = draw(4, 16, 192).requires_grad_()
    q, k, v = (described(192, 192) for _ in range(3))
    fc1, fc2 = described(192, 512), described(512, 192)
    tokens = (draw(4, 16, 192).requires_grad_(), draw(4, 16, 192).requires_grad_(), draw(4, 16, 192).requires_grad_())
    of_qkv, of_mlp = ([x, *(tensor for layer in group for tensor in layer[8:10])] for group in ((q, k, v), (fc1, fc2)))
    yield "qlora_qkv 192, 64 rows, both", partial(both, partial(eager.qlora_qkv, x, q, k, v), of_qkv)
    yield "qlora_mlp 192-512, 64 rows, both", partial(both, partial(eager.qlora_mlp, x, fc1, fc2), of_mlp)
    yield "attention 4x16x192, both", partial(both, partial(eager.attention, *tokens, 6), [*tokens])
    torch.manual_seed(0)
    encoder = MAE().encoder.eval()
    harlora.apply_qlora(encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=16, alpha=16)
    yield "encoder, 1 window", partial(torch.no_grad()(encoder), draw(1, 128, 6))


def counted(folder: Path) -> Counts:
    """Runs every call under callgrind; the counts by call.

    Raises: InputError if valgrind, its header or a C compiler is missing, or the calls fail.
    """
    valgrind, compiler = shutil.which("valgrind"), shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if valgrind is None or compiler is None:
        missing = "valgrind" if valgrind is None else "a C compiler"
        raise InputError(f"instructions: {missing} is not installed; install it (Debian: apt-get install valgrind gcc)")
    source, library, out = folder / "requests.c", folder / "requests.so", folder / "callgrind.out"
    source.write_text(_REQUESTS)
    built = subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=False)
    if built.returncode:
        raise InputError(
            "instructions: valgrind/callgrind.h is required and does not compile; install valgrind's headers"
        )
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HARLORA_CPU": KERNELS, "PYTHONHASHSEED": "0", "HARLORA_TUNING": "0",
    }  # fmt: skip
    environment.pop(dispatch.ENVIRONMENT, None)
    command = [
        valgrind, "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", sys.executable,
        "-m", "harlora.bench.instructions", "--run", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"instructions: the calls failed under valgrind (exit status {done.returncode}); see above")
    found: Counts = {}
    for file in folder.glob("callgrind.out.*"):
        text = file.read_text(encoding="utf-8", errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        if name is not None:
            found[name[1]] = parsed(text)
    return {name: found[name] for name in json.loads(done.stdout)}


def parsed(text: str) -> dict[str, int]:
    """The instructions in the compiled extension and in all, from one file of callgrind."""
    objects: dict[str, str] = {}
    costs: dict[str, int] = {}
    present, skip = "", False
    for line in text.splitlines():
        if line.startswith("ob="):
            number, _, name = line[3:].partition(" ")  # its name is given once, then the number alone
            objects.setdefault(number, name)
            present = objects[number]
        elif line.startswith("calls="):
            skip = True  # the next line is what the called function costs, which is counted where it is
        elif cost := re.match(r"[+\-*\d]\d* (\d+)$", line):
            if not skip:
                costs[present] = costs.get(present, 0) + int(cost[1])
            skip = False
        elif called := re.match(r"cob=(\(\d+\)) (.+)$", line):
            objects.setdefault(called[1], called[2])
    total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    assert total is not None, "callgrind's file has no totals"
    own = sum(cost for name, cost in costs.items() if re.search(r"/_C[^/]*\.so$", name))
    return {"extension": own, "process": int(total[1])}


def toolchain() -> dict[str, str]:
    """What the counts depend on beside the code."""
    path = cpp.extension_path()
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", path.read_bytes() if path else b"")
    return {
        "machine": platform.machine(),
        "compiler": compiler[0].decode() if compiler else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "kernels": KERNELS,
    }


def compared(old: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]) -> list[Change]:
    """Every count of every call of either."""
    names = [*new, *(name for name in old if name not in new)]
    return [
        Change(name, kind, old.get(name, {}).get(kind), new.get(name, {}).get(kind))
        for name in names
        for kind in COUNTS
    ]


def verdict(changes: list[Change]) -> tuple[str, int]:
    """What is to be said, and the exit status."""
    lines = [f"{'call':44} {'in':>10} {'baseline':>12} {'now':>12} {'change':>8}"]
    for change in changes:
        growth = "missing" if change.growth is None else f"{change.growth:+.2%}"
        note = "  FAILED" if change.failed else "  fewer" if (change.growth or 0) < -GROWTH else ""
        old, new = ("-" if value is None else value for value in (change.old, change.new))
        lines.append(f"{change.call:44} {change.kind:>10} {old:>12} {new:>12} {growth:>8}{note}")
    failed = [change for change in changes if change.failed]
    if failed:
        lines.append(
            f"{len(failed)} counts grew by more than {GROWTH:.0%} or are missing. Where that is meant: "
            "python -m harlora.bench.instructions --update, and the reason in the commit"
        )
    elif any((change.growth or 0) < -GROWTH for change in changes):
        lines.append("some calls need fewer instructions: --update the baseline, so that they stay so")
    else:
        lines.append(f"no count grew by more than {GROWTH:.0%}")
    return "\n".join(lines), 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harlora.bench.instructions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument(
        "--baseline", type=Path, default=BASELINE, help="by default instructions.json beside the program"
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # under callgrind
    options = parser.parse_args(arguments)
    if options.run:
        return _run(options.run)
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        sys.stderr.write("instructions: the AVX2 kernels are counted, on x86-64 alone\n")
        return 3
    try:
        if reason := cpp.load_extension():
            raise InputError(f"instructions: the compiled extension does not serve: {reason}")
        now = toolchain()
        before = None if options.update else read_json(options.baseline, "make one with --update")
        if before is not None and before["toolchain"] != now:
            past = before["toolchain"]
            differ = "; ".join(f"{key} {past.get(key)} -> {now[key]}" for key in now if past.get(key) != now[key])
            sys.stderr.write(
                f"instructions: the baseline is of another toolchain ({differ}), so counts cannot be compared; build "
                "the code from before with this one, --update, then compare\n"
            )
            return 3
        with tempfile.TemporaryDirectory() as folder:
            found = counted(Path(folder))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if before is None:
        write_json(options.baseline, {"toolchain": now, "calls": found})
        print(f"{len(found)} calls counted: {options.baseline.name}")
        return 0
    text, status = verdict(compared(before["calls"], found))
    print(text)
    return status


def _run(library: Path) -> int:
    requests = ctypes.CDLL(str(library))
    torch.set_num_threads(1)
    assert not cpp.load_extension()
    assert cpp.select_kernels(KERNELS) == KERNELS
    names = []
    for name, call in calls():
        sys.stderr.write(f"instructions: {name}\n")
        for _ in range(WARM):
            call()
        requests.begin()
        call()
        requests.end(name.encode())
        names.append(name)
    print(json.dumps(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
