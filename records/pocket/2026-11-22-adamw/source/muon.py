"""Muon: momentum, then the update's nearest semi-orthogonal matrix, found by Newton-Schulz iteration.

Source: Jordan et al. 2024; the view as steepest descent under the spectral norm is Bernstein & Newhouse 2024
(arXiv:2409.20325). The iteration is the odd polynomial one of Schulz 1933 and Higham 2008, eq. 5.22, with
coefficients that trade exact convergence for a steep slope at zero. Gupta et al. 2018 (Shampoo) without
accumulation gives the same update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # p(s) = a s + b s^3 + c s^5 on every singular value s


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each matrix by values near 1, keeping its singular vectors.

    Args:
        matrices: (n, rows, columns), a batch of one shape.
        steps: iterations; 5 bring singular values of at least 0.01 of the Frobenius norm into about [0.68, 1.14].
        dtype: of the arithmetic, bfloat16 where the machine has it.

    Returns:
        (n, rows, columns) in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the smaller Gram matrix
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum and orthogonalised updates for matrices; one buffer a matrix, half of Adam's state.

    Matrices of one shape are one parameter group, stacked and orthogonalised as a batch. With several ranks each
    keeps the momentum of its share of every group, orthogonalises that, and all gather the updates. Gradients
    are averaged over ranks before. An update is lr * sqrt(max(rows, columns)) times a near-orthogonal matrix;
    `dtype` is the arithmetic of the iteration and of what is gathered.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, ns_steps: int, dtype: torch.dtype) -> None:
        by_shape = defaultdict(list)
        for matrix in params:
            by_shape[tuple(matrix.shape)].append(matrix)
        groups = [{"params": matrices} for matrices in by_shape.values()]
        super().__init__(groups, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, dtype=dtype))
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix from its gradient."""
        pending = [self._start(group) for group in self.param_groups]  # gathering of one group overlaps work on the next
        for group, (updates, gathering) in zip(self.param_groups, pending, strict=True):
            if gathering is not None:
                gathering.wait()
            for matrix, update in zip(group["params"], updates, strict=False):  # the last rank's share may be padded
                matrix.add_(update, alpha=-group["lr"] * max(matrix.shape) ** 0.5)

    def _start(self, group: dict) -> tuple[Tensor, dist.Work | None]:
        """This rank's share of a group's updates, and the handle that makes them everyone's."""
        matrices = group["params"]
        share = -(-len(matrices) // self.world_size)
        mine = matrices[self.rank * share : (self.rank + 1) * share]
        updates = torch.zeros(share, *matrices[0].shape, dtype=group["dtype"], device=matrices[0].device)
        if mine:
            gradients = torch.stack([matrix.grad for matrix in mine])
            state = self.state[mine[0]]  # the share's momentum, stacked: (len(mine), rows, columns)
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"].mul_(group["momentum"]).add_(gradients)
            updates[: len(mine)] = orthogonalize(gradients.add_(momentum, alpha=group["momentum"]), group["ns_steps"], group["dtype"])
        if self.world_size == 1:
            return updates, None
        everyone = updates.new_empty(self.world_size * share, *updates.shape[1:])
        return everyone, dist.all_gather_into_tensor(everyone, updates, async_op=True)
