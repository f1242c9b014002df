"""An adapter for each way a device is worn, with a router that chooses, against one adapter for all.

UCI HAR's phones are at the waist, MotionSense's in a trouser pocket. Both adapters lie in one `AdapterPool` over one
4-bit encoder, which has seen neither dataset; a `Router` that learned from features of the training windows sends each
test window to one of them. Everybody who is tested is new. Results: one JSON a seed.

    harlora pretrain --sources dsa
    python -m harlora.bench.placements --encoder runs/pretrain-…/encoder.safetensors --seeds 0 1 2
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harlora.data.catalog import load_windows, people
from harlora.data.labels import VOCABULARY
from harlora.data.splits import split
from harlora.data.windows import Normalizer, Windows
from harlora.files import write_json
from harlora.models import Classifier
from harlora.nn import AdapterPool, Router, apply_qlora
from harlora.train.finetune import CHECKPOINT, TARGET_MODULES, FinetuneConfig, finetune, in_batches, load_classifier
from harlora.train.metrics import scores
from harlora.train.pretrain import Pretrained, load_pretrained
from harlora.train.runs import provenance

WORN = ("uci_hapt", "motionsense")
CPU = torch.device("cpu")
# One adapter cannot know how its windows are worn, so it is trained by the recipe of each of the two.
SHARED = {
    "one adapter, windows turned as at the waist": {"turned_deg": 5.0, "flipped": 0.0},
    "one adapter, windows turned as in a pocket": {"turned_deg": 15.0, "flipped": 0.3},
}


def joined(parts: list[Windows]) -> Windows:
    """The windows of several datasets as those of one, whose people are called ``dataset/name``."""
    counts = np.cumsum([0, *(len(part.subject_names) for part in parts)])
    stretches = np.cumsum([0, *(int(part.segments.max()) + 1 for part in parts)])
    return Windows(
        dataset="+".join(part.dataset for part in parts),
        signals=np.concatenate([part.signals for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        subjects=np.concatenate([part.subjects + first for part, first in zip(parts, counts, strict=False)]),
        subject_names=tuple(f"{part.dataset}/{name}" for part in parts for name in part.subject_names),
        segments=np.concatenate([part.segments + first for part, first in zip(parts, stretches, strict=False)]),
        starts=np.concatenate([part.starts for part in parts]),
        dropped={},
        too_short=0,
        domain="+".join(people(part) for part in parts),
    )


def compared(sets: list[Windows], pretrained: Pretrained, config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Macro-F1 over all labels of both datasets of each way, and how often the router is right, of one seed."""
    parts = [split(windows, "subject", config.seed) for windows in sets]
    tested = [
        tuple(windows.subject_names[who] for who in np.unique(windows.subjects[part.test]))
        for windows, part in zip(sets, parts, strict=True)
    ]

    def adapted(windows: Windows, who: tuple[str, ...], **settings: Any) -> Path:
        metrics = finetune(replace(config, test_people=who, **settings), windows, pretrained, out, device=CPU)
        (folder,) = out.glob(f"*{metrics['identity']}")
        return folder

    both = joined(sets)
    everybody = tuple(f"{s.dataset}/{name}" for s, names in zip(sets, tested, strict=True) for name in names)
    test = split(both, "subject", config.seed, everybody)
    labels = both.label_names()
    place = {name: number for number, name in enumerate(labels)}
    truth = np.array([place[VOCABULARY[label]] for label in both.labels[test.test]])
    signals = both.signals[test.test]
    worn = torch.from_numpy(np.repeat(np.arange(len(sets)), [len(s) for s in sets]))
    found: dict[str, Any] = {}

    def score(name: str, predicted: np.ndarray) -> None:
        result = scores(truth, predicted, labels)
        found[name] = {key: result[key] for key in ("macro_f1", "accuracy", "confusion")}

    for name, settings in SHARED.items():
        model, normalizer, names = load_classifier(adapted(both, everybody, **settings) / CHECKPOINT)
        logits = in_batches(model, torch.from_numpy(normalizer(signals)), device=CPU)
        score(name, np.array([place[n] for n in names])[logits.argmax(dim=1).numpy()])

    folders = [adapted(windows, who) for windows, who in zip(sets, tested, strict=True)]
    loaded = [load_classifier(folder / CHECKPOINT) for folder in folders]
    base = Classifier(copy.deepcopy(pretrained.encoder), len(loaded[0][2]))
    apply_qlora(base.encoder, TARGET_MODULES, rank=0, double_quant=config.double_quant)
    pool = AdapterPool(base, {s.dataset: folder / "adapter" for s, folder in zip(sets, folders, strict=True)})

    # What the router sees is normalised alike for all, since how a window is worn is what it is to find out.
    train = np.sort(np.concatenate([test.train, test.validation]))
    normalizer = Normalizer.fit(both.signals[train])
    encoder = pretrained.encoder.eval()

    def features(indices: np.ndarray) -> Tensor:
        x = torch.from_numpy(normalizer(both.signals[indices]))
        return in_batches(lambda part: encoder(part).mean(dim=1), x, device=CPU)

    chosen = Router(features(train), worn[train])(features(test.test))
    right = worn[test.test]
    found["router right"] = float((chosen == right).double().mean())

    def routed(index: Tensor) -> np.ndarray:
        x = torch.from_numpy(np.stack([loaded[which][1](window) for which, window in zip(index, signals, strict=True)]))
        best = in_batches(pool, x, index, device=CPU).argmax(dim=1)
        return np.array([place[loaded[which][2][k]] for which, k in zip(index.tolist(), best.tolist(), strict=True)])

    score("two adapters, the router's choice", routed(chosen))
    score("two adapters, the right choice", routed(right))
    score("two adapters, the wrong choice", routed(1 - right))
    return {"scores": found, "labels": list(labels), "windows": {"train": len(train), "test": len(test.test)}}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="of `harlora pretrain --sources dsa`")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="finished runs there are not repeated")
    parser.add_argument("--out", type=Path, default=Path("bench/results/placements"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrained = load_pretrained(arguments.encoder)
    sets = [load_windows(name, arguments.data) for name in WORN]
    for seed in arguments.seeds:
        config = FinetuneConfig(method="qlora", epochs=arguments.epochs, dropped=0.75, seed=seed)
        found = compared(sets, pretrained, config, arguments.runs)
        result = {**found, "config": config.values(), "pretrained": pretrained.identity, "sources": pretrained.sources,
                  "provenance": provenance(CPU)}  # fmt: skip
        write_json(arguments.out / f"seed-{seed}.json", result)
        for name, value in found["scores"].items():
            print(
                f"seed {seed}: {name}: {value if isinstance(value, float) else round(value['macro_f1'], 4)}", flush=True
            )


if __name__ == "__main__":
    main()
