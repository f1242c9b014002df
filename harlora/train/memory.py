"""What training really holds in memory, counted on the tensors and measured on one step, not computed from shapes."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from harlora.nn import QLoRALinear


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between steps, by what they are for.

    frozen: parameters without gradient and all buffers, 4-bit weights and their scales among them.
    trainable: parameters with gradient. gradients: as many again while a step runs.
    optimizer: its state; zero before the first step.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    return {
        "frozen": sum(t.nbytes for t in frozen),
        "trainable": sum(t.nbytes for t in trainable),
        "gradients": sum(t.nbytes for t in trainable),
        "optimizer": sum(t.nbytes for t in state),
    }


def matrix_bytes(model: nn.Module, paths: list[str]) -> tuple[int, int]:
    """Bytes in which the weights of the layers at ``paths`` are held, scales included, and their bytes in float32."""
    held = dense = 0
    for path in paths:
        layer = model.get_submodule(path)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        held += layer.quantized_weight().nbytes if isinstance(layer, QLoRALinear) else weight.nbytes
        assert isinstance(layer.in_features, int)
        assert isinstance(layer.out_features, int)
        dense += 4 * layer.in_features * layer.out_features
    return held, dense


def step_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once by one call of ``step`` beyond what was there before: activations, gradients
    and temporary tensors. On the CPU every allocation of torch's allocator is traced.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints to the terminal otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [
        event["args"] for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    memory.sort(key=lambda args: args["Ev Idx"])
    held = peak = 0
    for args in memory:
        held += args["Bytes"]
        peak = max(peak, held)
    return peak
