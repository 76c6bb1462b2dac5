"""Aligned-MTL: independent component alignment.

Senushkin, Patakin, Kuznetsov, Konushin: "Independent Component Alignment for Multi-Task
Learning", CVPR 2023, arXiv:2305.19000.

The condition number of the Jacobian J (K, P), sigma_max / sigma_min, measures at once how much the
task gradients conflict and how unequal they are. The nearest matrix to J whose condition number is
one, and whose singular values are at most sigma_min, is ``J^ = sigma U V^T`` with the SVD
``J = U S V^T`` (an orthogonal Procrustes problem, section 4.2). It is found in task space from the
Gram matrix ``M = J J^T = U diag(lambda) U^T`` alone (Algorithm 1):

    B     = sigma * U_R diag(lambda_R ** -1/2) U_R^T         J^ = B J
    alpha = B w                                              d  = J^T alpha = J^^T w

over the R eigenvalues above rounding error, with ``sigma = sqrt(min lambda_R)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Method, View, on_host, upload

SCALES = ("min", "median", "rmse")


def balance_matrix(gram: Tensor, scale: str = "min", eps: float = 1e-14) -> Tensor:
    """The matrix B (K, K) of Algorithm 1, so that ``B @ J`` has condition number one.

    Args:
        gram: Gram matrix (K, K), float64.
        scale: common singular value of the aligned gradients: "min", the smallest kept singular
            value of J; "median", the (lower) median; "rmse", the root mean square.
        eps: eigenvalues below ``K * eps * largest`` count as zero and are dropped.

    Returns:
        Symmetric positive semi-definite float64 tensor (K, K); zero for a zero Gram matrix.
    """
    gram = gram.double()
    if scale != "median" and not on_host(gram.device):
        try:  # here, so that a copy of this file works without it
            from ..device_solvers import balance_matrix as without_eigenvalues
        except ImportError:
            pass
        else:
            return without_eigenvalues(gram, scale, eps)
    eigenvalues, vectors = torch.linalg.eigh(gram)  # ascending
    largest = eigenvalues[-1]
    keep = (eigenvalues > largest * len(gram) * eps) & (eigenvalues > 0)
    if scale == "min":
        common = torch.where(keep, eigenvalues, largest).min()
    elif scale == "median":
        # The R kept eigenvalues are the last ones; their lower median lies R // 2 from the end.
        common = eigenvalues.gather(0, (len(gram) - 1 - keep.sum() // 2)[None])
    else:
        common = torch.where(keep, eigenvalues, 0.0).sum() / keep.sum().clamp(min=1)
    # One division under the root keeps B exact when J is tiny or huge.
    ratio = torch.where(keep, common / torch.where(keep, eigenvalues, 1.0), 0.0).clamp(min=0)
    return (vectors * ratio.sqrt()) @ vectors.T


def aligned_weights(
    gram: Tensor, preference: Tensor | None = None, scale: str = "min", eps: float = 1e-14
) -> Tensor:
    """Weights ``alpha = B w`` of Aligned-MTL.

    Args:
        gram: Gram matrix (K, K).
        preference: task importances w (K,); 1/K each by default.
        scale: see `balance_matrix`.
        eps: see `balance_matrix`.

    Returns:
        float64 tensor (K,).
    """
    k = len(gram)
    w = torch.full((k,), 1.0 / k, dtype=torch.float64, device=gram.device)
    return balance_matrix(gram, scale, eps) @ (w if preference is None else preference.to(w))


class AlignedMTL(Method):
    """Aligned-MTL (Algorithm 1); with ``features`` in `backward`, Aligned-MTL-UB (section 5.2).

    Args:
        scale: "min" (the paper), "median" or "rmse" (in the official code alone).
        preference: task importances w, K non-negative numbers with a positive sum; 1/K each by
            default. They are used as given, not normalised.
        head_gradients: "raw" (default, as in the paper) or "weighted".

    Where the official code (SamsungLabs/MTL) differs, and what is done here:

    * It sums the columns of the aligned gradients, w = 1: its step is K times ours. Kept: the
      paper's 1/K.
    * It applies task importances by scaling the losses before alignment. Kept: Algorithm 1, which
      aligns first. For the other reading, scale the losses that you pass.
    * It drops eigenvalues by float32's rounding unit whatever the dtype. Here: by that of the
      gradients, so float64 keeps more.
    * An all-zero Jacobian raises there. Here: B = 0, so the weights and the step are zero.

    On an accelerator "min" and "rmse" are found without eigenvalues, so nothing waits for the
    device. "median" is one of them, and waits.

    The length of the step jumps where an eigenvalue falls below rounding error: near-collinear
    gradients give a tiny step, exactly collinear ones a full step. That is the method's own.
    """

    name = "aligned_mtl"
    title = "Aligned-MTL"
    paper = "Senushkin et al., CVPR 2023"
    year = 2023
    sees = "gram"

    def __init__(
        self,
        scale: str = "min",
        preference: Sequence[float] | None = None,
        *,
        head_gradients: str = "raw",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if scale not in SCALES:
            raise ValueError(f"aligned_mtl: expected scale {', '.join(SCALES)}, got {scale!r}")
        if preference is not None:
            preference = [float(w) for w in preference]
            if min(preference, default=-1.0) < 0 or not 0 < sum(preference) < float("inf"):
                raise ValueError(
                    "aligned_mtl: expected preference to be non-negative numbers with a positive "
                    f"sum, got {preference}"
                )
        self.scale = scale
        self.syncs = scale == "median"  # an eigenvalue, whose search asks the host if it ended
        self.preference = preference

    def _rule(self, view: View) -> Tensor:
        w = None
        if self.preference is not None:
            if len(self.preference) != view.n_tasks:
                raise ValueError(
                    f"aligned_mtl: expected a preference for each of {view.n_tasks} tasks, got "
                    f"{len(self.preference)}"
                )
            w = torch.tensor(self.preference, dtype=torch.float64)[view.tasks]
            w = upload(w, view.device)
        return aligned_weights(view.gram, w, self.scale, view.eps)
