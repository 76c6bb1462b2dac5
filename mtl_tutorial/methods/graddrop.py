"""GradDrop: gradient sign dropout.

Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov: "Just Pick a Sign: Optimizing Deep Multitask
Models with Gradient Sign Dropout", NeurIPS 2020, arXiv:2010.06808.

Where the tasks disagree about a coordinate's sign, one sign is drawn and the other side is dropped.
Per coordinate, with a number U drawn uniformly from [0, 1), the purity of the positive sign and the
masks are

    P = (1 + sum_k g_k / sum_k |g_k|) / 2,
    M_k = 1 where g_k > 0 and P > U, or g_k < 0 and P < U;  else 0,

and the step is ``d = sum_k (l_k + (1 - l_k) M_k) g_k`` with leaks l_k between 0 and 1 (Algorithm 1,
lines 10 to 15). Its expectation without leaks is ``P sum_k g_k^+ + (1 - P) sum_k g_k^-``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Method, View, upload


def graddrop_step(rows: Tensor, uniform: Tensor, leak: Tensor | None = None) -> Tensor:
    """The step of GradDrop for given random numbers.

    Args:
        rows: task gradients (K, P).
        uniform: one number in [0, 1) per coordinate (P,).
        leak: share of each task that is never dropped (K,); zeros by default.

    Returns:
        Tensor (P,), dtype of `rows`. A coordinate that is zero for all tasks stays zero, and one
        on whose sign all tasks agree is their sum.
    """
    dtype = rows.dtype
    rows = rows.to(torch.promote_types(dtype, torch.float32))
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    up, down = positive.sum(0), negative.sum(0)
    mass = up - down  # sum of |g_k|
    purity = up / torch.where(mass > 0, mass, 1.0)
    keep = purity > upload(uniform, rows.device).to(rows.dtype)
    if leak is None:
        return torch.where(keep, up, down).to(dtype)
    leak = upload(leak, rows.device).to(rows.dtype)
    kept = torch.where(keep, (1 - leak) @ positive, (1 - leak) @ negative)
    return (leak @ rows + kept).to(dtype)


class GradDrop(Method):
    """GradDrop on the gradients of the shared parameters, or of the features.

    Args:
        leak: share of a task's gradient that is never dropped: one number between 0 (default)
            and 1 (the plain sum) for all tasks, or one per task.
        seed: of the random signs, one draw per coordinate and step.

    There are no task weights, as the step is made per coordinate; heads receive their raw
    gradients.

    Deviations:

    * The paper puts a layer on shared activations and decides for each activation, on gradients
      multiplied by its sign. Here: on parameter gradients, as the code of CAGrad, FAMO and TorchJD
      does; or, with ``features``, on dL_k/dz without that sign.
    * The purity enters as it is; the paper also allows a monotone function of it.
    * Where U equals P, which the paper leaves without either sign, the negative side is kept.
    """

    name = "graddrop"
    title = "GradDrop"
    paper = "Chen et al., NeurIPS 2020"
    year = 2020
    sees = "rows"
    memory = "2 K x P"
    state = "random generator"
    properties = frozenset({"scale", "permutation"})

    def __init__(self, leak: float | Sequence[float] = 0.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        values = [leak] if isinstance(leak, int | float) else list(leak)
        if not values or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"graddrop: expected leak between 0 and 1, got {leak}")
        self.leak = float(leak) if isinstance(leak, int | float) else [float(x) for x in leak]
        self.seed = seed
        self._draw: tuple[Tensor, Tensor | None] | None = None

    def _rule(self, view: View) -> None:
        """No weights; draws here, where a skipped step can put the generator back."""
        assert view.rows is not None
        leak = None
        if isinstance(self.leak, list):
            if len(self.leak) != view.n_tasks:
                raise ValueError(
                    f"graddrop: expected a leak for each of {view.n_tasks} tasks, got "
                    f"{len(self.leak)}"
                )
            leak = torch.tensor(self.leak, dtype=torch.float64)[view.tasks]
        elif self.leak > 0:
            leak = torch.full((len(view.tasks),), self.leak, dtype=torch.float64)
        self._draw = torch.rand(view.rows.shape[1], generator=self._generator), leak

    def _combine(self, weights: Tensor | None, rows: Tensor) -> Tensor:
        assert self._draw is not None
        (uniform, leak), self._draw = self._draw, None
        return graddrop_step(rows, uniform, leak)
