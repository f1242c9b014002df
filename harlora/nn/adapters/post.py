"""What can be done to low-rank changes once they are trained: fewer ranks, intruder dimensions, averages of clients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from harlora.nn.adapters.adapter import LowRank


def squeeze(change: LowRank, rank: int) -> LowRank:
    """The nearest change of at most ``rank``, by the singular value decomposition of scale·B·A, which is not formed.

    Of lower rank where the matrix has no more. With B = Q_b·R_b and Aᵀ = Q_a·R_a it is that of the small R_b·R_aᵀ.
    Source: LoRA-Squeeze (arXiv 2602.10993).

    Raises: ValueError unless ``rank`` is from 1 to that of the change.
    """
    if not 1 <= rank <= len(change.A):
        raise ValueError(f"squeeze: rank must be from 1 to {len(change.A)}, got {rank}")
    Qb, Rb = torch.linalg.qr(change.B.double())
    Qa, Ra = torch.linalg.qr(change.A.double().T)
    U, S, Vt = torch.linalg.svd(change.scale * Rb @ Ra.T)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    A = root[:, None] * (Vt[:rank] @ Qa.T)
    return LowRank(A.to(change.A.dtype), ((Qb @ U[:, :rank]) * root).to(change.B.dtype))


def intruders(weight: Tensor, change: Tensor, *, most: int = 10, similarity: float = 0.5) -> Tensor:
    """Which of the ``most`` largest left singular vectors of ``weight + change`` are like none of ``weight``'s.

    weight, change: ``(out_features, in_features)``. similarity: the cosine below which a vector is an intruder.
    Returns their places, int64. Source: Shuttleworth et al. 2024 (arXiv 2410.21228), definition 1.
    """
    before = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    after = torch.linalg.svd((weight + change).double(), full_matrices=False)[0][:, :most]
    return torch.nonzero((after.T @ before).abs().amax(dim=1) < similarity).flatten()


def without_intruders(
    weight: Tensor, change: LowRank, *, factor: float = 0.75, most: int = 10, similarity: float = 0.5
) -> LowRank:
    """The change with the singular values of the intruder dimensions of ``weight + change`` times ``factor``, cut to
    the same rank again. Other arguments as in `intruders`.
    """
    dense = change.dense()
    found = intruders(weight, dense, most=most, similarity=similarity)
    if not len(found):
        return change
    U, S, Vt = torch.linalg.svd((weight + dense).double(), full_matrices=False)
    rank = len(change.A)
    lowered = dense.double() + (factor - 1) * (U[:, found] * S[found]) @ Vt[found]
    U, S, Vt = torch.linalg.svd(lowered, full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank((root[:, None] * Vt[:rank]).to(change.A.dtype), (U[:, :rank] * root).to(change.B.dtype))


def average(clients: Sequence[LowRank], weights: Sequence[float], *, ridge: float | None = None) -> LowRank:
    """One change for changes that were trained apart, factor by factor, as FedAvg averages parameters.

    weights: of the clients, for example how many windows each has; scaled to sum to 1.
    ridge: if given, B is corrected so that B·A is near the average of the clients' products, which the product of
        averages is not: ΔB = (ΔW - B̄·Ā)·Āᵀ·(Ā·Āᵀ + ridge·1)⁻¹. As LoRA-FAIR (arXiv 2411.14961) does on the server, in
        closed form for its squared error; the paper minimises a cosine dissimilarity by steps.
    Raises: ValueError if there are no clients, or not a weight for each, or their ranks differ.
    """
    if not clients or len(weights) != len(clients) or len({len(client.A) for client in clients}) > 1:
        raise ValueError(
            f"average: requires clients of one rank and a weight for each, got {len(clients)} of ranks "
            f"{sorted({len(client.A) for client in clients})} and {len(weights)} weights"
        )
    shares = [weight / sum(weights) for weight in weights]
    scale = clients[0].scale
    pairs = list(zip(shares, clients, strict=True))
    A = torch.stack([share * client.A for share, client in pairs]).sum(dim=0)
    B = torch.stack([share * client.B * (client.scale / scale) for share, client in pairs]).sum(dim=0)
    if ridge is not None:
        product = torch.stack([share * client.dense() for share, client in pairs]).sum(dim=0) / scale
        gram = A @ A.T + ridge * torch.eye(len(A), dtype=A.dtype, device=A.device)
        B = B + torch.linalg.solve(gram, A @ (product - B @ A).T).T
    return LowRank(A, B, scale)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of two sets of features, from 0 to 1 (Kornblith et al. 2019, arXiv 1905.00414).

    x: ``(samples, features)``; y: ``(samples, other features)``.
    """
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
