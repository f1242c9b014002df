"""Many adapters over one 4-bit encoder, a batch in which each window has its own: all at once, or one after another.

    python -m harlora.bench.pool --out bench/results/pool/cpu.json

Competitors take turns, in alternating order; seconds are medians. The peer is bitsandbytes + PEFT, with its own mixed
batches (``adapter_names``) and with ``set_adapter`` before the windows of each adapter.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harlora
from harlora.bench import peers
from harlora.bench.cases import MODELS, TARGETS
from harlora.files import write_json
from harlora.models import MAE
from harlora.train.runs import provenance

RANK = 8
POOL, MIXED = "harlora, AdapterPool", "harlora, AdapterPool mixed"
PEER_MIXED, PEER_LOOP = "bitsandbytes + PEFT, adapter_names", "bitsandbytes + PEFT, set_adapter"

Run = Callable[[Tensor, Tensor], Tensor]


def by_adapter(models: Callable[[int], Callable[[Tensor], Tensor]]) -> Run:
    """Runs the windows of each adapter by themselves and puts them back in order."""

    def run(x: Tensor, index: Tensor) -> Tensor:
        y: Tensor | None = None
        for which in index.unique().tolist():
            chosen = index == which
            part = models(which)(x[chosen])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[chosen] = part
        assert y is not None
        return y

    return run


def held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each memory once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def competitors(count: int, folder: Path) -> tuple[dict[str, tuple[Run, int]], Run]:
    """Each way with its bytes, and what they should give, in float64."""
    torch.manual_seed(0)
    encoder = MAE(MODELS["A"]).encoder.eval().requires_grad_(False)
    models = []
    for number in range(count):
        model = harlora.apply_qlora(copy.deepcopy(encoder), TARGETS, rank=RANK, alpha=2 * RANK)
        for lora_A, lora_B in peers.adapters(model):
            lora_A.data.normal_(std=lora_A.shape[1] ** -0.5)
            lora_B.data.normal_(std=0.05)
        harlora.save_adapter(model, folder / str(number))
        models.append(model.eval())
    folders = {str(number): folder / str(number) for number in range(count)}
    plain = [harlora.merge_adapters(copy.deepcopy(model)).double() for model in models]
    found: dict[str, tuple[Run, int]] = {}
    for name, together in ((POOL, False), (MIXED, True)):
        base = harlora.apply_qlora(copy.deepcopy(encoder), TARGETS, rank=0)
        pool = harlora.nn.AdapterPool(base, folders, mixed=together)
        found[name] = pool, held(pool)
    if not peers.absent(peers.PEER):
        theirs, size = _peer(encoder, models)

        def mixed(x: Tensor, index: Tensor) -> Tensor:
            y: Tensor = theirs(x, adapter_names=[f"a{which}" for which in index.tolist()])
            return y

        def chosen(which: int) -> Any:
            theirs.set_adapter(f"a{which}")
            return theirs

        found |= {PEER_MIXED: (mixed, size), PEER_LOOP: (by_adapter(chosen), size)}
    exact = by_adapter(lambda which: plain[which])
    return found, lambda x, index: exact(x.double(), index)


def _peer(encoder: nn.Module, models: list[Any]) -> tuple[Any, int]:
    import peft

    theirs = copy.deepcopy(encoder)
    peers._replace_(theirs, TARGETS, peers._bitsandbytes_layer)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    wrapped = peft.get_peft_model(theirs, config, adapter_name="a0")
    for number in range(1, len(models)):
        wrapped.add_adapter(f"a{number}", config)
    layers: list[Any] = [module for module in wrapped.modules() if hasattr(module, "base_layer")]
    with torch.no_grad():
        for number, model in enumerate(models):
            for layer, (lora_A, lora_B) in zip(layers, peers.adapters(model), strict=True):
                layer.lora_A[f"a{number}"].weight.copy_(lora_A)
                layer.lora_B[f"a{number}"].weight.copy_(lora_B)
    return wrapped.eval(), held(wrapped)


@torch.no_grad()
def measure(count: int, windows: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each way."""
    config = MODELS["A"]
    with tempfile.TemporaryDirectory() as folder:
        runs, exact = competitors(count, Path(folder))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(windows, config.window, config.channels, generator=generator)
    index = torch.arange(windows)[torch.randperm(windows, generator=generator)] % count
    wanted = exact(x, index)
    rows: list[dict[str, Any]] = []
    times: dict[str, list[float]] = {}
    for name, (run, size) in runs.items():
        error = peers.relative_error([run(x, index)], [wanted])
        row = {"name": name, "adapters": count, "windows": windows, "relative_error": error, "held_bytes": size}
        # The peer's layers compute in bfloat16 where the processor has it.
        if error < (peers.ERROR_LIMIT if name in (POOL, MIXED) else peers.REDUCED_ERROR_LIMIT):
            times[name] = []
        else:
            row["left_out"] = "wrong: its relative error is above the limit"
        rows.append(row)
    order, end = list(times), time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name in order:
            began = time.perf_counter()
            runs[name][0](x, index)
            times[name].append(time.perf_counter() - began)
        order.reverse()
    for row in rows:
        if row["name"] in times:
            mine = times[row["name"]]
            row |= {"seconds": statistics.median(mine), "rounds": len(mine)}
            row["ratio_to_pool"] = statistics.median(a / b for a, b in zip(mine, times[POOL], strict=True))
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of windows")
    parser.add_argument("--out", type=Path, default=Path("bench/results/pool/cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for windows in arguments.windows:
        for row in measure(arguments.adapters, windows, arguments.seconds):
            print({key: value for key, value in row.items() if key != "adapters"}, flush=True)
            rows.append(row)
    versions = {name: peers._version(name) for name in peers.COMPETITORS[peers.PEER].packages}
    write_json(arguments.out, {"rows": rows, "rank": RANK, "model": "A", "peer": versions,
                               "provenance": provenance(torch.device("cpu"))})  # fmt: skip


if __name__ == "__main__":
    main()
