"""What training really holds in memory: counted on the tensors, and traced through torch's allocator in one step.

Nothing is computed from shapes or parameter counts. Two things are not seen, in no method: what fits the stack of a
thread, where our CPU kernels have a panel of decoded weight, and what libraries under torch allocate by themselves.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from harlora.kernels.format import code_table, nested_code_table
from harlora.nn import QLoRALinear
from harlora.nn.linear import AdaptedLinear
from harlora.train.capture import TrainingStep

_FORWARD = "harlora: forward"


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind ``tensors`` by its address: all of it, also where a tensor views a part."""
    return {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between steps, by what they are for; each piece of memory counts once.

    packed: weights in 4 bits. scales: theirs, nested ones and code tables included. dense: all other frozen parameters,
    and buffers. frozen: these three.
    adapters: what they train. other_trained: all other parameters with gradient. trainable: these two.
    gradients: that there are now; of the same tensors, from backward until they are set to None.
    optimizer: its state; zero before the first step.
    """
    layers = [module for module in model.modules() if isinstance(module, QLoRALinear)]
    scales: list[Tensor] = []
    for layer in layers:
        scales += [t for t in (layer.absmax, layer.nested_absmax, layer.nested_offset) if t is not None]
        scales.append(code_table(layer.quant_type, layer.weight.device))
        if layer.nested_absmax is not None:
            scales.append(nested_code_table(layer.weight.device))
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    adapters = [factor for layer in adapted for factor in (layer.lora_A, layer.lora_B) if factor is not None]
    for each in adapted:
        if each.adapter is not None:
            adapters += [parameter for parameter in each.adapter.parameters() if parameter.requires_grad]
    parameters = list(model.parameters())
    kinds: dict[str, Iterable[Tensor]] = {
        "packed": [layer.weight for layer in layers],
        "scales": scales,
        "adapters": adapters,
        "other_trained": [p for p in parameters if p.requires_grad],
        "dense": [*parameters, *model.buffers()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)],
    }
    counted: set[int] = set()
    held: dict[str, int] = {}
    for name, tensors in kinds.items():
        storages = _storages(tensors)
        held[name] = sum(size for address, size in storages.items() if address not in counted)
        counted |= storages.keys()
    held["frozen"] = held["packed"] + held["scales"] + held["dense"]
    held["trainable"] = held["adapters"] + held["other_trained"]
    return held


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


class _Event(NamedTuple):
    """Memory that torch's allocator gave out, or took back: then ``size`` is negative. ``time`` in microseconds."""

    address: int
    size: int
    time: float


def _traced(call: Callable[[], object], device: torch.device) -> tuple[list[_Event], float]:
    """What torch's allocator did for ``device`` in ``call``, in order, and when `_FORWARD` ended in it, if it did."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints to the terminal otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kind = 1 if device.type == "cuda" else 0  # as c10::DeviceType counts them
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind]
    # Of several threads, as backward on a GPU has them, the numbers are not in order of time.
    memory.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    forward = (event["ts"] + event["dur"] for event in events if event.get("name") == _FORWARD)
    return [_Event(e["args"]["Addr"], e["args"]["Bytes"], e["ts"]) for e in memory], next(forward, inf)


def step_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once by one call of ``step`` beyond what was there before: activations, gradients
    and temporary tensors. On the CPU every allocation of torch's allocator is traced.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return max(accumulate((event.size for event in _traced(step, device)[0]), initial=0))


@dataclass(eq=False)
class _Block:
    """A piece of memory that was allocated while traced, and by which events of the allocator."""

    address: int
    size: int
    first: int
    last: float = inf


def _blocks(events: Sequence[_Event]) -> list[_Block]:
    blocks: list[_Block] = []
    alive: dict[int, _Block] = {}
    for index, (address, size, _) in enumerate(events):
        if size > 0:
            alive[address] = _Block(address, size, index)
            blocks.append(alive[address])
        elif size < 0 and address in alive:  # or else it was there before
            alive.pop(address).last = index
    return blocks


def _most(blocks: Iterable[_Block]) -> int:
    """The most bytes of ``blocks`` that lived at once."""
    changes = [change for b in blocks for change in ((b.first, b.size), (b.last, -b.size))]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


def step_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    batch: Callable[[], Sequence[Tensor]],
    *,
    clip_norm: float | None = None,
) -> dict[str, int]:
    """What one training step allocates, by what it is for; the step is taken, and its gradients stay.

    batch: its tensors on the model's device.
    saved: activations that backward needs, as autograd was given them, each piece of memory once; without parameters,
        buffers and the batch.
    working: the most at once of all else but gradients: temporary tensors, and whatever else is kept.
    step_peak: the most at once of all together, gradients included.
    On the CPU that is what torch's allocator gave out to the thread that trains, on a GPU what it gave out there.

    loss, clip_norm: as `TrainingStep` takes them. batch: makes the tensors of a batch.
    """
    device = next(model.parameters()).device
    # Tensors outside the model that layers save beside what they compute, such as code tables, were there before: no
    # block that was allocated within the step has their address.
    saved: dict[int, int] = {}
    inputs: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))
        return tensor

    def watched(*tensors: Tensor) -> Tensor:
        inputs.update(_storages(tensors))
        with saved_tensors_hooks(pack, lambda tensor: tensor), record_function(_FORWARD):
            return loss(*tensors)

    step = TrainingStep(model, watched, optimizer, clip_norm=clip_norm)
    events, end = _traced(lambda: step(*batch()), device)
    blocks, forward = _blocks(events), sum(event.time <= end for event in events)
    gradients = _storages(p.grad for p in model.parameters() if p.grad is not None)
    then = {block.address: block for block in blocks if block.first < forward <= block.last}
    given = {then[address] for address in inputs.keys() & then.keys()}
    kept = {then[address] for address in saved.keys() & then.keys()} - given
    grown = {block for block in blocks if block.last == inf and block.address in gradients}
    return {
        "batch": sum(inputs.values()),
        "saved": sum(block.size for block in kept),
        "working": _most(set(blocks) - given - kept - grown),
        "step_peak": _most(blocks),
    }
