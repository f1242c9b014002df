"""The one training loop: AdamW on a one-cycle schedule, early stopping, and a state from which a killed run goes on.

All randomness of an epoch comes from the seed and the number of the epoch, so a run that is resumed at an epoch's
start takes the same steps as one that never stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors
from harlora.nn.adapters import Schedule
from harlora.train.capture import TrainingStep
from harlora.train.processes import Processes
from harlora.train.sampler import Sampler

Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them

_STEPS_AT_LEAST = 20  # an epoch of few labels repeats them, so that few labels still get enough steps
_SAVE_EVERY_S = 15.0


@dataclass(frozen=True)
class Optimisation:
    """How a model is trained.

    batch_size: windows a step. learning_rate: the highest of the one-cycle schedule. warmup: share of the steps in
    which it rises. weight_decay: of matrices; vectors have none. averaged: an epoch is judged by the mean validation
    score of so many epochs up to it; the epochs before there are so many are not judged. patience: epochs without a
    better mean before training stops, or None.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float = 0.1
    clip_norm: float = 1.0
    averaged: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "averaged"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Fitted:
    """What training did.

    history: the training loss, and the validation score if there is one, of each epoch.
    best_epoch: counted from 1; the epoch whose weights the model has now.
    seconds: of training, all sessions of a resumed run together.
    optimizer: with its state after the last step.
    """

    history: list[dict[str, float]]
    best_epoch: int
    seconds: float
    optimizer: torch.optim.Optimizer


def silent(done: int, total: int, note: str) -> None:
    """Report nothing."""


def make_optimizer(model: nn.Module, settings: Optimisation, *, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, weight decay on matrices alone.

    capturable: into a CUDA graph, which needs the learning rate as a tensor on the model's device.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate: float | Tensor = settings.learning_rate
    if capturable:
        rate = torch.tensor(rate, device=trainable[0].device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True, capturable=capturable)


def fit(
    model: nn.Module,
    batch: Callable[[Tensor], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    samples: Tensor,
    settings: Optimisation,
    *,
    seed: int,
    identity: str,
    state_file: Path,
    capture: bool = False,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    validate: Callable[[], float] | None = None,
    processes: Processes | None = None,
    report: Report = silent,
    save_every_s: float = _SAVE_EVERY_S,
) -> Fitted:
    """Train ``model`` in place; with ``validate``, it ends with the weights of the best epoch.

    batch: the tensors of a batch, given the elements of ``samples`` in it; may draw from the CPU's random numbers.
    loss: a scalar, of those tensors on the model's device.
    samples: ``(n,)``, int64.
    capture: the steps into a CUDA graph; what that asks of ``loss`` is said at `TrainingStep`.
    schedule: of the model's adapters; called after each step.
    sampler: which of the samples an epoch takes; by default all.
    validate: a score to be maximised; called in evaluation mode after each epoch.
    processes: that take each step together; then ``loss`` calls the model as `Processes.joined` gives it.
    identity: a hash of everything that decides the result; a state of another identity is refused.
    state_file: written every ``save_every_s`` seconds, at the end of an epoch; removed at the end.
    Raises: InputError if there are fewer than two samples, or ``state_file`` is damaged or of another run.
    """
    if len(samples) < 2:
        raise InputError(f"training requires 2 windows or more, got {len(samples)}; use more labels")
    size = min(settings.batch_size, len(samples))
    if processes is not None:
        processes.check(size)
    count = sampler.count if sampler else len(samples)
    steps = max(count // size, _STEPS_AT_LEAST)
    total = steps * settings.epochs
    optimizer = make_optimizer(model, settings, capturable=capture)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=total + 1, pct_start=settings.warmup, cycle_momentum=False
    )
    take_step = TrainingStep(model, loss, optimizer, clip_norm=settings.clip_norm, capture=capture)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_epoch = 0
    seconds = 0.0
    if state_file.exists():
        saved, info = load_tensors(state_file, kind="training state", remedy="delete it, the run begins anew")
        if info["identity"] != identity:
            raise InputError(f"{state_file}: belongs to another run; delete it, the run begins anew")
        history, best_epoch, seconds = info["history"], info["best_epoch"], info["seconds"]
        model.load_state_dict(_part(saved, "model."))
        best = _part(saved, "best.")
        _load_optimizer(optimizer, saved)
        if schedule:
            schedule.load(_part(saved, "schedule."))
        if sampler:
            sampler.load(_part(saved, "sampler."))
        rates.load_state_dict({**rates.state_dict(), "last_epoch": steps * len(history)})
        for group, rate in zip(optimizer.param_groups, info["rates"], strict=True):
            _set_rate(group, rate)
    last_save = time.monotonic()
    while len(history) < settings.epochs:
        epoch = len(history)
        if best and settings.patience is not None and epoch - best_epoch >= settings.patience:
            break
        started = time.perf_counter()
        torch.manual_seed(seed * 100_003 + epoch)
        passes = range(-(-steps * size // count))
        order = torch.cat([sampler.order() if sampler else torch.randperm(len(samples)) for _ in passes])
        model.train()
        summed = 0.0
        for step in range(steps):
            value = take_step(*batch(samples[order[step * size : (step + 1) * size]]))
            rates.step()
            if schedule:
                schedule.after_step((epoch * steps + step + 1) / total)
            summed += finite((processes.mean(value) if processes else value).item(), epoch, settings)
            report(epoch * steps + step + 1, total, f"epoch {epoch + 1}, loss {summed / (step + 1):.3f}")
        entry = {"loss": summed / steps}
        if validate:
            model.eval()
            with torch.no_grad():
                entry["validation"] = validate()
        history.append(entry)
        judged = validate and epoch + 1 >= min(settings.averaged, settings.epochs)
        if judged and (not best or _mean_score(history, settings) > _mean_score(history[:best_epoch], settings)):
            best, best_epoch = {k: v.detach().clone() for k, v in model.state_dict().items()}, epoch + 1
        seconds += time.perf_counter() - started
        if time.monotonic() - last_save >= save_every_s and (processes is None or processes.is_first):
            tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
            tensors |= {f"best.{name}": value for name, value in best.items()}
            tensors |= _optimizer_tensors(optimizer)
            if schedule:
                tensors |= {f"schedule.{name}": value for name, value in schedule.state().items()}
            if sampler:
                tensors |= {f"sampler.{name}": value for name, value in sampler.state().items()}
            info = {
                "identity": identity,
                "history": history,
                "best_epoch": best_epoch,
                "seconds": seconds,
                "rates": [float(group["lr"]) for group in optimizer.param_groups],
            }
            save_tensors(state_file, tensors, kind="training state", info=info)
            last_save = time.monotonic()
    if best:
        model.load_state_dict(best)
    model.eval()
    return Fitted(history, best_epoch or len(history), seconds, optimizer)


def finite(loss: float, epoch: int, settings: Optimisation) -> float:
    """``loss`` of a step of the epoch, counted from 0. Raises: InputError if it is no number any more."""
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged in epoch {epoch + 1}: the loss is {loss}; required a lower learning_rate than "
            f"{settings.learning_rate:g}"
        )
    return loss


def _mean_score(history: list[dict[str, float]], settings: Optimisation) -> float:
    # On few people single scores jump about: the highest is often one early epoch's luck, and with it alone training
    # would stop before the learning rate has fallen.
    return fmean(entry["validation"] for entry in history[-settings.averaged :])


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(saved, "optimizer.").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
