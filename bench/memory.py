"""Peak memory of one forward and backward through a 4096×4096 layer, beyond what any such layer must hold.

`measure` runs this file in a fresh process: memory that an earlier case freed would be used again and not be seen.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FEATURES = 4096


def measure(name: str, rows: int, threads: int) -> dict[str, Any]:
    """Extra bytes of one step of a competitor, ``extra_native_bytes`` and ``extra_torch_bytes``.

    Extra is beyond inputs, outputs, gradients and saved t. Native: growth of the process's peak resident memory, in
    pages, whoever asked for them; None with a note where the kernel does not let a process reset its peak. torch:
    growth of the bytes held through torch's allocator, which does not see the scratch of compiled kernels.
    Raises: RuntimeError with the last line that a failing process said.
    """
    command = [sys.executable, "-m", "harlora.bench.memory", name, str(rows), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status")


def _child(name: str, rows: int, threads: int) -> dict[str, Any]:
    import torch
    from torch import nn

    from harlora.bench import peers
    from harlora.train.memory import step_peak_bytes

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def layer_of(features: int) -> tuple[nn.Module, list[nn.Parameter]]:
        model: Any = peers.adapt(name, nn.Sequential(nn.Linear(features, features)), ["0"]).train()
        return model[0], [p for pair in peers.adapters(model) for p in pair]

    def step(layer: nn.Module, x: torch.Tensor, parameters: list[nn.Parameter], grad: torch.Tensor) -> object:
        y = layer(x)
        return y, torch.autograd.grad(y, [x, *parameters], grad)

    small, parameters = layer_of(64)  # loads code, starts threads, runs the probes
    step(small, torch.randn(1, 64, requires_grad=True), parameters, torch.randn(1, 64))

    layer, parameters = layer_of(FEATURES)
    x, grad = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES)
    # y and dX, gradients of the adapters, t
    needed = 2 * x.nbytes + sum(p.nbytes for p in parameters) + 4 * rows * peers.RANK
    result: dict[str, Any] = {"needed_bytes": needed}
    try:
        # What malloc keeps of freed memory is resident already; used again, it would not raise the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_bytes()
        kept = step(layer, x, parameters, grad)
        result |= {"extra_native_bytes": _peak_bytes() - before - needed, "native_note": "VmHWM"}
        del kept
    except (OSError, AttributeError) as error:
        result |= {"extra_native_bytes": None, "native_note": f"not measured: {type(error).__name__}"}
    peak = step_peak_bytes(lambda: step(layer, x, parameters, grad), torch.device("cpu"))
    return result | {"extra_torch_bytes": peak - needed}


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
