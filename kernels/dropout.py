"""Which values of an adapter's input are dropped: a function of a seed and their place, so that no mask is kept.

Value (row, column) of x as ``(rows, columns)`` takes half ``column % 8`` of the four words that Philox4x32 with seven
rounds (Salmon et al. 2011, table 2: passes BigCrush) makes of the counter (row, column // 8, 0, 0) and the seed as its
key; halves from the low one of the first word to the high one of the last. It is kept if that half, below 2¹⁶, is at
least `limit`. The kernels that compute the same are csrc/cpu/dropout.cpp and kernels/triton/dropout.py.
"""

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def limit(dropout: float) -> int:
    """What a half word must reach for its value to be kept: ``dropout`` in steps of 2⁻¹⁶, below 1.

    Raises: ValueError if ``dropout`` is not at least 0 and below 1.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    return min(round(dropout * 65536), 65535)


def rescale(dropout: float) -> float:
    """What kept values are multiplied by, so that the expectation is the value itself."""
    return 65536 / (65536 - limit(dropout))


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the random numbers of ``device``: int64, a scalar there, which a CUDA graph draws anew."""
    return torch.randint(2**63 - 1, (), device=device, dtype=torch.int64)


def kept(rows: int, columns: int, dropout: float, seed: Tensor) -> Tensor:
    """Whether each value is kept, ``(rows, columns)``, bool, on the device of ``seed``."""
    groups = -(-columns // 8)
    # Words are int64 below 2³²; products wrap, which leaves their 64 bits right.
    words = [
        torch.arange(rows, device=seed.device)[:, None].expand(rows, groups),
        torch.arange(groups, device=seed.device).expand(rows, groups),
        seed.new_zeros(()),
        seed.new_zeros(()),
    ]
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ keys[0],
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ keys[1],
            first & _LOW,
        ]
        keys = [(keys[0] + 0x9E3779B9) & _LOW, (keys[1] + 0xBB67AE85) & _LOW]
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves >= limit(dropout)).view(rows, 8 * groups)[:, :columns]


def dropped(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """``x``, ``(rows, columns)``, with zeros where values are dropped and the others multiplied by `rescale`."""
    rows, columns = x.shape
    return torch.where(kept(rows, columns, dropout, seed), x * rescale(dropout), 0.0).to(x.dtype)
