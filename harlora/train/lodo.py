"""Leave one dataset out: pretrain on all others, adapt to the one left out, by every method, protocol and seed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from harlora.data.catalog import available, dataset, load_windows, require_apart
from harlora.data.splits import PROTOCOLS
from harlora.data.windows import Windows
from harlora.errors import InputError
from harlora.files import write_json
from harlora.models.mae import MAEConfig
from harlora.train.capture import Capture, captures
from harlora.train.finetune import METHODS, FinetuneConfig, finetune
from harlora.train.fit import Report
from harlora.train.pretrain import PretrainConfig, load_pretrained, pretrain


@dataclass(frozen=True)
class Preset:
    """Sizes and schedules of a whole study."""

    pretrain: PretrainConfig
    finetune: FinetuneConfig


PRESETS = {
    # Both stages on a part of the windows and half the tokens: shows every step within minutes, not the best scores.
    "quick": Preset(
        PretrainConfig(
            model=MAEConfig(patch_size=16),
            epochs=5,
            batch_size=128,
            max_windows=1200,
        ),
        FinetuneConfig(
            epochs=5,
            max_windows=1500,
        ),
    ),
    "standard": Preset(PretrainConfig(), FinetuneConfig()),
}


@dataclass(frozen=True)
class Study:
    """Which runs a leave-one-dataset-out study consists of."""

    preset: str = "quick"
    """quick: minutes, on a part of the windows; standard: hours, on all of them."""
    targets: tuple[str, ...] = ()
    """Datasets to leave out, one after the other; by default all that are found."""
    sources: tuple[str, ...] = ()
    """Datasets to pretrain on, always without the target and its people; by default all that are found."""
    methods: tuple[str, ...] = tuple(METHODS)
    """zero_shot, linear_probe, scratch, full, lora, qlora."""
    protocols: tuple[str, ...] = PROTOCOLS
    """subject: nobody is on both sides of the split; paper: windows at random."""
    seeds: tuple[int, ...] = (0,)
    """Each seed has its own split, pretraining and adaptation."""
    ranks: tuple[int, ...] = (8,)
    """Of LoRA and QLoRA; more than one draws macro-F1 by rank."""
    label_fractions: tuple[float, ...] = (1.0,)
    """Shares of the target's training windows that are used."""
    windows_per_class: tuple[int, ...] = ()
    """Further runs with so many labelled windows of each class."""

    def check(self) -> None:
        """Raise InputError unless every setting has a possible value."""
        if self.preset not in PRESETS:
            raise InputError(f"unknown preset {self.preset!r}; required one of {', '.join(PRESETS)}")
        for config in self.adaptations(0):
            config.check()

    def adaptations(self, seed: int) -> Iterator[FinetuneConfig]:
        """The configuration of every run on one target."""
        base = PRESETS[self.preset].finetune
        few: list[dict[str, Any]] = [{"label_fraction": fraction} for fraction in self.label_fractions]
        few += [{"windows_per_class": count} for count in self.windows_per_class]
        for protocol in self.protocols:
            for method in self.methods:
                adapter = METHODS[method].adapter if method in METHODS else None
                for labels in few if method != "zero_shot" else [{}]:
                    for rank in self.ranks if adapter else (base.rank,):
                        scale = base.alpha / base.rank  # the same scaling at every rank
                        yield replace(
                            base, method=method, protocol=protocol, seed=seed, rank=rank, alpha=scale * rank, **labels
                        )


class Progress(Protocol):
    """Where a study shows how far it is."""

    def run(self, name: str, number: int, total: int) -> Report:
        """A run begins; what is returned takes its steps."""
        ...

    def say(self, text: str) -> None:
        """One line that stays."""
        ...


def result_file(metrics: dict[str, Any]) -> str:
    """The name of a result's file: readable, and different for every configuration."""
    config = metrics["config"]
    rank = f"-r{config['rank']}" if METHODS[config["method"]].adapter else ""
    return (
        f"{metrics['target']}-{config['protocol']}-{config['method']}{rank}-s{config['seed']}-"
        f"{metrics['identity'][:8]}.json"
    )


def lodo(
    study: Study,
    root: Path,
    runs: Path,
    results: Path,
    *,
    device: torch.device,
    capture: Capture = "off",
    progress: Progress,
) -> list[dict[str, Any]]:
    """Run the study and return its results, which are also written to ``results``, one JSON file each.

    Pretraining is done once for a target and seed, and shared by its runs. What is finished under ``runs`` is not
    repeated; what was interrupted goes on.

    capture: as in `pretrain`.
    Raises: InputError if a dataset is unknown or missing, fewer than two domains are left, or ``capture`` is not
    possible.
    """
    study.check()
    captures(capture, device)
    names = [entry.name for entry in available(root)]
    sources = [dataset(name, root) for name in study.sources or names]
    targets = [dataset(name, root) for name in study.targets or names]
    loaded: dict[str, Windows] = {}

    def windows(name: str) -> Windows:
        if name not in loaded:
            loaded[name] = load_windows(name, root)
        return loaded[name]

    plan = []
    for target in targets:
        whose = {source.name: source.domain for source in sources if source.domain != target.domain}
        require_apart(whose)
        others = list(whose)
        if not others:
            raise InputError(
                f"leaving out {target.name} leaves no dataset to pretrain on; give at least two datasets of "
                "different people"
            )
        plan += [(target.name, others, seed, list(study.adaptations(seed))) for seed in study.seeds]
    total = sum(1 + len(configs) for *_, configs in plan)
    done = 0
    records = []
    for target_name, others, seed, configs in plan:
        preset = PRESETS[study.preset]
        done += 1
        title = f"pretraining on {', '.join(others)}"
        checkpoint = pretrain(
            replace(preset.pretrain, seed=seed),
            [windows(name) for name in others],
            runs,
            device=device,
            capture=capture,
            report=progress.run(title, done, total),
        )
        for config in configs:
            done += 1
            name = f"{target_name}, {config.protocol}, {config.method}"
            metrics = finetune(
                config,
                windows(target_name),
                load_pretrained(checkpoint),
                runs,
                sources=[windows(name) for name in others],
                device=device,
                capture=capture,
                report=progress.run(name, done, total),
            )
            record = {"preset": study.preset, **metrics}
            file = results / result_file(record)
            if not file.exists():
                write_json(file, record)
            records.append(record)
            progress.say(
                f"{name}: macro-F1 {metrics['scores']['macro_f1']:.3f}"
                + (" (SYNTHETIC data)" if metrics["synthetic"] else "")
            )
    return records
