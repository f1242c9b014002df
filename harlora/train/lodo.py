"""Leave one dataset out: pretrain on all others, adapt to the one left out, by every method, protocol and seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harlora.data.splits import PROTOCOLS
from harlora.train.experiment import Experiment
from harlora.train.finetune import METHODS

# What the study compares unless told otherwise; bitfit and partial cost as much and are rarely asked for.
MAIN_METHODS = ("zero_shot", "linear_probe", "scratch", "full", "lora", "qlora")


@dataclass(frozen=True)
class Study:
    """Which runs a leave-one-dataset-out study consists of."""

    preset: str = "quick"
    """quick: minutes, on a part of the windows; standard: hours, on all of them."""
    targets: tuple[str, ...] = ()
    """Datasets to leave out, one after the other; by default all that are found."""
    sources: tuple[str, ...] = ()
    """Datasets to pretrain on, always without the target and its people; by default all that are found."""
    methods: tuple[str, ...] = MAIN_METHODS
    """zero_shot, linear_probe, scratch, full, lora, qlora; also bitfit, which trains biases, and partial, which trains
    the last blocks."""
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

    def experiment(self) -> Experiment:
        """The study as an experiment.

        Raises: InputError unless every setting has a possible value.
        """
        grids: list[Mapping[str, tuple[Any, ...]]] = []
        for protocol in self.protocols:
            for method in self.methods:
                ranks = self.ranks if method in METHODS and METHODS[method].ranked else ()
                few: list[dict[str, tuple[Any, ...]]] = [{"label_fraction": self.label_fractions}]
                few += [{"windows_per_class": self.windows_per_class}] if self.windows_per_class else []
                grids += [
                    {
                        "protocol": (protocol,),
                        "method": (method,),
                        **labels,
                        **({"rank": ranks} if ranks else {}),
                    }
                    for labels in few
                ]
        experiment = Experiment(
            name="lodo",
            title="Leave one dataset out",
            preset=self.preset,
            targets=self.targets,
            sources=self.sources,
            seeds=self.seeds,
            runs=tuple(grids),
        )
        experiment.check()
        return experiment
