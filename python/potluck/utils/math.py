"""The two matrix helpers of PowerSGD."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def get_flatten_greedy_dims(tensor: torch.Tensor, max_ndim: int = 2) -> list[int]:
    """Merge the neighbouring dimensions with the smallest product until ``max_ndim`` are left."""
    dims = list(tensor.shape)
    while len(dims) > max_ndim:
        at = min(range(len(dims) - 1), key=lambda i: dims[i] * dims[i + 1])
        dims[at : at + 2] = [dims[at] * dims[at + 1]]
    return dims


def orthogonalize_(matrix: torch.Tensor, eps: float = 1e-8) -> None:
    """Make the columns orthonormal, in place and in order."""
    import torch

    with torch.no_grad():
        for i in range(matrix.shape[1]):
            column = matrix[:, i]
            column.div_(column.norm().clamp_min(eps))
            rest = matrix[:, i + 1 :]
            rest.addmm_(column[:, None], (column @ rest)[None, :], alpha=-1)
