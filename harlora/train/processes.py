"""One training over several processes that ``torchrun`` has started, by way of Accelerate; alone without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.train.runs import Run, open_run

_COUNT = "WORLD_SIZE"  # set by torchrun


class Processes:
    """The processes that train one model, each on its share of every batch.

    A step is the step of one process with the whole batch: every process draws all of the batch's random numbers and
    takes its share of the windows, and gradients are averaged.

    rank: the number of this one, from 0. count: of all.
    Raises: InputError if there are several and Accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count = 0, 1
        self._accelerator: Any = None
        if int(os.environ.get(_COUNT, "1")) > 1:
            try:
                from accelerate import Accelerator
            except ModuleNotFoundError as error:
                raise InputError(
                    f"{_COUNT} says that torchrun started several processes, which requires Accelerate; install "
                    "harlora with its extra scale: pip install --no-build-isolation '.[har,scale]' in the source folder"
                ) from error
            self._accelerator = Accelerator(cpu=device.type == "cpu")
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Raise InputError unless a batch can be shared out evenly."""
        if batch_size % self.count:
            raise InputError(
                f"batch_size, or the number of windows where that is less, must be a multiple of the {self.count} "
                f"processes, so that each has as many windows, got {batch_size}"
            )

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Of a batch, the windows that are for this process."""
        return tuple(tensor[self.rank :: self.count] for tensor in batch)

    def joined(self, model: nn.Module) -> nn.Module:
        """``model`` as the loss must call it so that gradients are averaged; its parameters are the same tensors."""
        if self._accelerator is None:
            return model
        joined: nn.Module = self._accelerator.prepare_model(model)
        return joined

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all processes."""
        if self._accelerator is None:
            return value
        mean: Tensor = self._accelerator.reduce(value, "mean")
        return mean

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    @contextmanager
    def open_run(self, root: Path, name: str, config: dict[str, Any]) -> Iterator[Run]:
        """As `runs.open_run`, for all of these processes together; the first one holds it."""
        if not self.is_first:
            self.wait()
            yield Run.existing(root, name, config)
            self.wait()
            return
        with open_run(root, name, config) as run:
            self.wait()
            yield run
            self.wait()
