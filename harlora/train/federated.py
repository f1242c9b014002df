"""Training in which people's windows stay with them: each is a client, a server averages what they learned."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors
from harlora.nn.adapters import LowRank
from harlora.nn.adapters.post import average
from harlora.train.capture import TrainingStep
from harlora.train.fit import Fitted, Optimisation, Report, finite, make_optimizer, silent

SERVERS = ("average", "fair")
RIDGE = 1e-2  # of LoRA-FAIR's correction, as in the paper's penalty


def aggregate(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], *, ridge: float | None = None
) -> dict[str, Tensor]:
    """What the server sends to all clients, given what each trained.

    Every tensor is the weighted mean of the clients'. With ``ridge``, B of each adapter is then corrected so that B·A
    is near the mean of the clients' products: see `harlora.nn.adapters.post.average`. As many bytes go either way.

    states: of each client, the tensors by name, those of an adapter ending in ``lora_A`` and ``lora_B``; tensors of
        whole numbers, such as counters, are the first client's. weights: such as how many windows each has.
    """
    shares = [weight / sum(weights) for weight in weights]
    mean = {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(dim=0)
        if value.is_floating_point()
        else value.clone()
        for name, value in states[0].items()
    }
    if ridge is not None:
        for name in mean:
            if name.endswith("lora_A"):
                other = f"{name.removesuffix('lora_A')}lora_B"
                changes = [LowRank(state[name], state[other]) for state in states]
                mean[other] = average(changes, weights, ridge=ridge).B
    return mean


def federate(
    model: nn.Module,
    batch: Callable[[Tensor], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    clients: Sequence[Tensor],
    settings: Optimisation,
    *,
    ridge: float | None,
    seed: int,
    identity: str,
    state_file: Path,
    report: Report = silent,
) -> Fitted:
    """Train ``model`` in place, a round an epoch: each client takes a pass over its samples from the server's weights.

    clients: of each, its samples, ``(n,)``, int64; one with fewer than two takes no part. The learning rate falls from
    round to round as a cosine. ridge: None for plain averages. Other arguments as in `fit`.
    Raises: InputError if fewer than two clients have samples, or ``state_file`` is damaged or of another run.
    """
    clients = [samples for samples in clients if len(samples) > 1]
    if len(clients) < 2:
        raise InputError(f"federated training requires windows of 2 people or more, got {len(clients)}")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers() if "running_" in name or name.endswith("num_batches_tracked")}
    sizes = [len(samples) for samples in clients]
    total = settings.epochs * sum(max(1, size // settings.batch_size) for size in sizes)
    history: list[dict[str, float]] = []
    seconds, done = 0.0, 0
    if state_file.exists():
        saved, info = load_tensors(state_file, kind="training state", remedy="delete it, the run begins anew")
        if info["identity"] != identity:
            raise InputError(f"{state_file}: belongs to another run; delete it, the run begins anew")
        history, seconds, done = info["history"], info["seconds"], info["done"]
        model.load_state_dict(saved)
    optimizer = make_optimizer(model, settings)
    while len(history) < settings.epochs:
        started = time.perf_counter()
        torch.manual_seed(seed * 100_003 + len(history))
        rate = settings.learning_rate * (1 + torch.tensor(torch.pi * len(history) / settings.epochs).cos().item()) / 2
        before = {name: value.clone() for name, value in model.state_dict().items() if name in names}
        states, summed, steps = [], 0.0, 0
        for samples in clients:
            model.load_state_dict(before, strict=False)
            optimizer = make_optimizer(model, settings)  # a client keeps nothing from round to round
            for group in optimizer.param_groups:
                group["lr"] = rate
            step = TrainingStep(model, loss, optimizer, clip_norm=settings.clip_norm)
            model.train()
            for part in samples[torch.randperm(len(samples))].tensor_split(max(1, len(samples) // settings.batch_size)):
                summed += finite(step(*batch(part)).item(), len(history), settings)
                steps, done = steps + 1, done + 1
                report(done, total, f"round {len(history) + 1}, loss {summed / steps:.3f}")
            states.append({name: value.clone() for name, value in model.state_dict().items() if name in names})
        model.load_state_dict(aggregate(states, sizes, ridge=ridge), strict=False)
        history.append({"loss": summed / steps})
        seconds += time.perf_counter() - started
        info = {"identity": identity, "history": history, "seconds": seconds, "done": done}
        save_tensors(state_file, model.state_dict(), kind="training state", info=info)
    model.eval()
    return Fitted(history, len(history), seconds, optimizer)
