"""Random changes of training windows that leave the activity the same. Arithmetic in torch, on whole batches."""

import torch
from torch import Tensor


def random_rotations(count: int) -> Tensor:
    """Rotations uniform over all orientations, ``(count, 3, 3)`` (from normalised Gaussian quaternions)."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(count, 4), dim=1).unbind(1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=1).view(count, 3, 3)


def small_rotations(count: int, degrees: float) -> Tensor:
    """Rotations about random axes, ``(count, 3, 3)``; each component of the angle is Gaussian of ``degrees``."""
    vector = torch.randn(count, 3) * (degrees * torch.pi / 180)
    generator = torch.zeros(count, 3, 3)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        generator[:, j, i] = vector[:, k]
        generator[:, i, j] = -vector[:, k]
    return torch.matrix_exp(generator)


def half_turns(count: int) -> Tensor:
    """Half a turn about one of the device's axes, each equally often, ``(count, 3, 3)``."""
    return torch.eye(3)[torch.randint(3, (count,))].mul(2).sub(1).diag_embed()


def rotate(signals: Tensor, rotations: Tensor) -> Tensor:
    """Windows as a device turned by ``rotations`` would have measured them; both sensors turn together.

    signals: ``(batch, window, 6)``, acceleration then angular velocity; rotations: ``(batch, 3, 3)``.
    """
    sensors = signals.unflatten(-1, (-1, 3)).flatten(1, 2)
    return torch.bmm(sensors, rotations.transpose(1, 2)).view_as(signals)


def warp_time(signals: Tensor, slowest: float) -> Tensor:
    """A random part of each window, at least ``slowest`` of its length, stretched to the whole window.

    signals: ``(batch, window, channels)``.
    """
    batch, window, _ = signals.shape
    length = torch.empty(batch, 1).uniform_(slowest, 1.0)
    start = torch.rand(batch, 1) * (1 - length)
    position = (start + length * torch.linspace(0, 1, window)) * (window - 1)
    left = position.long().clamp(max=window - 2)
    weight = (position - left)[:, :, None]
    index = left[:, :, None].expand_as(signals)
    return torch.lerp(signals.gather(1, index), signals.gather(1, index + 1), weight)


def rescale(signals: Tensor, deviation: float) -> Tensor:
    """Windows with each sensor's signal multiplied by a Gaussian factor around 1.

    signals: ``(batch, window, 6)``.
    """
    factors = 1 + deviation * torch.randn(len(signals), 1, 2)
    return signals * factors.repeat_interleave(3, dim=2)
