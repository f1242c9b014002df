"""Which layers are worth an adapter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harlora.nn.adapters.post import linear_cka


@torch.no_grad()
def changes(modules: Sequence[nn.Module], run: Callable[[], Any]) -> list[float]:
    """How much each module changes what goes in: 1 - CKA of its input and output, both the mean over tokens.

    modules: each takes and gives ``(samples, tokens, features)``. run: calls the model that they are in, once, on
    samples whose labels nobody needs.
    Source: layer-wise LoRA by similarity (c2d-usp/Layer-wise-LoRA-with-CKA), which adapts those that change it most.
    Raises: ValueError if one of them did not run.
    """
    found: dict[int, float] = {}

    def note(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[index] = 1 - float(linear_cka(inputs[0].mean(dim=1), output.mean(dim=1)))

        return hook

    hooks = [module.register_forward_hook(note(index)) for index, module in enumerate(modules)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < len(modules):
        raise ValueError(f"changes: {len(modules) - len(found)} of {len(modules)} modules did not run")
    return [found[index] for index in range(len(modules))]
