"""What adapting does to what an encoder had learned: intruder dimensions, and how well it still restores patches.

LoRA of low ranks and full fine-tuning on a dataset; then the pretrained decoder behind the adapted encoder, on windows
of what it was pretrained on. Of LoRA also with its intruder dimensions scaled down (Shuttleworth et al. 2024, arXiv
2410.21228). Results: one JSON a target and seed.

    harlora pretrain --sources dsa
    python -m harlora.bench.forgetting --encoder runs/pretrain-…/encoder.safetensors --seeds 0 1 2
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harlora.data.catalog import load_windows
from harlora.data.labels import VOCABULARY
from harlora.data.splits import split
from harlora.data.windows import Normalizer, Windows
from harlora.files import write_json
from harlora.models import MAE
from harlora.nn import adapted_layers
from harlora.nn.adapter_files import lora_change
from harlora.nn.adapters.post import without_intruders
from harlora.train.finetune import CHECKPOINT, FinetuneConfig, finetune, in_batches, load_classifier
from harlora.train.metrics import macro_f1
from harlora.train.pretrain import Pretrained, load_mae, load_pretrained
from harlora.train.runs import provenance

TARGETS = ("uci_hapt", "motionsense")
METHODS = {"LoRA r=1": ("lora", 1), "LoRA r=2": ("lora", 2), "LoRA r=4": ("lora", 4), "full": ("full", 8)}
FACTOR = 0.75  # of the singular values of intruder dimensions, as in the source's released code
CPU = torch.device("cpu")


def restoring(mae: MAE, sources: list[Windows], windows: int) -> Callable[[nn.Module], float]:
    """The loss of the decoder behind a given encoder, on some windows of the sources with patches left out."""
    rng = np.random.default_rng(0)
    parts = [rng.permutation(len(source))[: windows // len(sources)] for source in sources]
    x = torch.from_numpy(
        np.concatenate([Normalizer.fit(s.signals)(s.signals[chosen]) for s, chosen in zip(sources, parts, strict=True)])
    )
    order = torch.rand(len(x), mae.config.tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1)

    @torch.no_grad()
    def loss(encoder: nn.Module) -> float:
        whole = copy.deepcopy(mae)
        whole.encoder = encoder.eval()  # type: ignore[assignment]
        return float(whole(x, order)[0])

    return loss


def measured(
    target: Windows, pretrained: Pretrained, loss: Callable[[nn.Module], float], config: FinetuneConfig, out: Path
) -> dict[str, Any]:
    """Macro-F1, intruders a matrix and the loss of restoring, of one method on one target and seed."""
    metrics = finetune(config, target, pretrained, out, device=CPU)
    (folder,) = out.glob(f"*{metrics['identity']}")
    model, normalizer, labels = load_classifier(folder / CHECKPOINT)
    test = split(target, "subject", config.seed).test
    x = torch.from_numpy(normalizer(target.signals[test]))
    truth = np.array([labels.index(VOCABULARY[label]) for label in target.labels[test]])

    def score() -> float:
        return macro_f1(truth, in_batches(model, x, device=CPU).argmax(dim=1).numpy())

    found = {"macro_f1": score(), "intruders": metrics["intruders"], "loss": loss(model.encoder)}
    layers = dict(adapted_layers(model.encoder))
    if layers:
        with torch.no_grad():
            for path, layer in layers.items():
                change = lora_change(path, layer)
                milder = without_intruders(layer.base_weight(), change, factor=FACTOR)
                assert layer.lora_A is not None
                assert layer.lora_B is not None
                layer.lora_A.copy_(milder.A * (milder.scale / layer.scaling))
                layer.lora_B.copy_(milder.B)
        found["milder"] = {"macro_f1": score(), "loss": loss(model.encoder)}
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="of `harlora pretrain`, its decoder beside it")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="finished runs there are not repeated")
    parser.add_argument("--out", type=Path, default=Path("bench/results/forgetting"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrained = load_pretrained(arguments.encoder)
    mae = load_mae(arguments.encoder)
    loss = restoring(mae, [load_windows(name, arguments.data) for name in pretrained.sources], 2000)
    for name in arguments.targets:
        target = load_windows(name, arguments.data)
        for seed in arguments.seeds:
            found: dict[str, Any] = {"before": loss(mae.encoder)}
            for title, (method, rank) in METHODS.items():
                config = FinetuneConfig(
                    method=method, rank=rank, alpha=2.0 * rank, epochs=arguments.epochs, dropped=0.75, seed=seed
                )
                found[title] = measured(target, pretrained, loss, config, arguments.runs)
                print(f"{name}, seed {seed}, {title}: {found[title]}", flush=True)
            result = {"target": name, "seed": seed, "epochs": arguments.epochs, "methods": found,
                      "pretrained": pretrained.identity, "sources": pretrained.sources,
                      "provenance": provenance(CPU)}  # fmt: skip
            write_json(arguments.out / f"{name}-seed-{seed}.json", result)


if __name__ == "__main__":
    main()
