"""ExcessMTL: weigh tasks by their excess risk.

He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi, Zhao: "Robust Multi-Task Learning with Excess Risks",
ICML 2024.

A task with noisy labels keeps a large loss for ever, so weighing by losses feeds the noise. Its
excess risk, the loss above the best that the model can reach, goes to zero. To second order the
excess risk of task k is ``g_k^T H_k^-1 g_k / 2`` (equation 6), with the Hessian replaced by the
diagonal of Adagrad (equation 7):

    S_k <- S_k + g_k * g_k,        E_k = sum_p g_kp^2 / sqrt(S_kp + 1e-7).

Divided by its value at the start, it drives an exponentiated-gradient ascent on the weights
(equation 9):

    R_k = E_k / E0_k,              w_k <- w_k exp(step_size R_k), normalised.

The equation numbers are those that TorchJD's documentation quotes; the paper's body was not at
hand, so the released code (yifei-he/ExcessMTL) is what this file follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View

EPSILON = 1e-7  # the official code's, inside the root


def excess_risks(rows: Tensor, squares: Tensor) -> Tensor:
    """Estimated excess risks E_k, up to the factor 1/2 that cancels in the ratio.

    Args:
        rows: task gradients (K, P).
        squares: sums S of all squared gradients so far, this step's included (K, P).

    Returns:
        float64 tensor (K,), between 0 and the 1-norms of the rows.
    """
    return (rows**2 / (squares + EPSILON).sqrt()).sum(1, dtype=torch.float64)


class ExcessMTL(Method):
    """ExcessMTL: task weights from excess risks, on the simplex.

    Args:
        step_size: eta of the exponentiated gradient, 0 or more. The official code's default is
            1e-2, its README's Office-Home command uses 1; the paper's values per data set are
            not known to us.
        warmup: number of first steps with uniform weights, 1 or more; the mean E_k over them is
            the baseline E0_k. 1 is the official code (its "first_epoch" is the first step); the
            paper's appendix reportedly takes three epochs. Gradients at initialisation are small,
            so with 1 the ratios R_k start far above one and the weights can run away to a single
            task: on MultiDigits they do, and three epochs cure it.
        head_gradients: "weighted" (default, as in the official code) or "raw".

    State: S (K, P) in the dtype of the gradients, log weights, baselines, steps seen. S belongs to
    the shared parameters in their order: pass the same ``shared`` at every step.

    Where the official code differs, and what is done here:

    * Its weights sum to K. Here: to one; the two are proportional at every step.
    * It multiplies weights, which overflows for a large ``step_size * R``. Here: log weights.
    * A task whose first gradient is zero gets 0/0 = NaN for ever. Here: steps in which a task has
      no gradient do not count for its warm-up, and its ratio is zero until that is over.
    * Feature level: there is none (the official switch gives zero risks); `backward` raises.

    The per-coordinate estimate is not invariant to rotations of parameter space.
    """

    name = "excess_mtl"
    title = "ExcessMTL"
    paper = "He et al., ICML 2024"
    year = 2024
    sees = "rows"
    memory = "2 K x P"
    state = "K x P squared gradients, K weights"
    feature_level = False
    properties = frozenset({"permutation"})  # scale holds up to EPSILON alone

    def __init__(
        self, step_size: float = 1e-2, warmup: int = 1, *, head_gradients: str = "weighted"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= step_size < float("inf"):
            raise ValueError(f"excess_mtl: expected a finite step_size >= 0, got {step_size}")
        if warmup != int(warmup) or warmup < 1:
            raise ValueError(f"excess_mtl: expected a whole number warmup >= 1, got {warmup}")
        self.step_size = step_size
        self.warmup = warmup

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        assert view.rows is not None
        k, device = view.n_tasks, view.device
        # Squares of half-precision gradients leave its range, so at least float32.
        dtype = torch.promote_types(view.rows.dtype, torch.float32)
        return {
            "squares": torch.zeros(k, view.rows.shape[1], dtype=dtype, device=device),
            "log_weights": torch.zeros(k, dtype=torch.float64, device=device),
            "baseline": torch.zeros(k, dtype=torch.float64, device=device),
            "seen": torch.zeros(k, dtype=torch.int64, device=device),
        }

    def _rule(self, view: View) -> Tensor:
        assert view.rows is not None
        state = self._state
        rows = view.rows.to(state["squares"].dtype)
        if state["squares"].shape != (view.n_tasks, rows.shape[1]):
            raise ValueError(
                f"excess_mtl: expected gradients of {tuple(state['squares'].shape)} tasks x "
                f"parameters as in earlier steps, got {(view.n_tasks, rows.shape[1])}; create a "
                "new ExcessMTL when tasks or shared parameters change"
            )
        every = len(view.tasks) == view.n_tasks
        at = view.index
        squares = torch.addcmul(state["squares"] if every else state["squares"][at], rows, rows)
        risks = excess_risks(rows, squares)
        warm = state["seen"][at] < self.warmup
        # Warm-up counts the steps in which a task has a gradient, so no baseline is zero.
        baseline = torch.where(
            warm, state["baseline"][at] + risks / self.warmup, state["baseline"][at]
        )
        ratio = torch.where(warm, 0.0, risks / torch.where(warm, 1.0, baseline))
        seen = state["seen"][at] + (risks > 0)
        log_weights = state["log_weights"][at] + self.step_size * ratio
        new = {"squares": squares, "log_weights": log_weights, "baseline": baseline, "seen": seen}
        self._state = new if every else {k: state[k].index_copy(0, at, v) for k, v in new.items()}
        return torch.softmax(log_weights, 0)
