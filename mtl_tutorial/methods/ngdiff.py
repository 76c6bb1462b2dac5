"""NGDiff: normalised gradient difference, to forget one thing and retain another.

Bu, Jin, Vinzamuri, Ramakrishna, Chang, Cevher, Hong: "Unlearning as multi-task optimization: A
normalized gradient difference approach with an adaptive learning rate", NAACL 2025,
arXiv:2410.22086.

The retain loss R is to fall and the forget loss F is to rise. With both gradients at unit length,

    d = g_R / |g_R| - g_F / |g_F|,

so that, with their cosine c,

    g_R . d = |g_R| (1 - c) >= 0        and        g_F . d = -|g_F| (1 - c) <= 0:

to first order R never rises and F never falls, whatever the sizes of the two losses.

Only the paper's abstract was at hand. Its learning rate is GeN's, see `gen_lr`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View, upload


def ngdiff_weights(norms: Tensor, signs: Tensor) -> Tensor:
    """Weights ``sign_k / |g_k|`` (n,) in float64; zero for a zero gradient."""
    alive = norms > 0
    return torch.where(alive, signs / torch.where(alive, norms, 1.0), 0.0)


class NGDiff(Method):
    """NGDiff, for exactly two tasks in the roles retain and forget.

    Args:
        forget: index of the forget loss, 0 or 1 (default); the other is the retain loss. Pass both
            as the losses that are measured: this method turns the forget loss's sign itself.
        head_gradients: "weighted" (default) or "raw". Raw gradients would let the forget task's
            head learn what is to be forgotten.

    The step has length ``sqrt(2 - 2 c)``, whatever the size of the gradients: it does not shrink
    near a minimum, which is why the method comes with a learning rate of its own, `GeNLR`.

    Where the paper is silent: a zero gradient, and a task that is absent from the batch, leave the
    other task's unit gradient; parallel gradients give a zero step. The forget loss has no bound,
    so training wants a stopping rule.
    """

    name = "ngdiff"
    title = "NGDiff"
    paper = "Bu et al., NAACL 2025"
    year = 2025
    sees = "gram"
    n_tasks = 2
    properties = frozenset({"rotation"})  # the step has its own length, the tasks their roles

    def __init__(self, forget: int = 1, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)
        if forget not in (0, 1):
            raise ValueError(f"ngdiff: expected forget to be 0 or 1, got {forget!r}")
        self.forget = forget

    def _rule(self, view: View) -> Tensor:
        if view.n_tasks != 2:
            raise ValueError(
                f"ngdiff: expected two tasks, retain and forget, got {view.n_tasks}; add the "
                "losses of each side up first"
            )
        signs = [-1.0 if task == self.forget else 1.0 for task in view.tasks]
        roles = upload(torch.tensor(signs, dtype=torch.float64), view.device)
        return ngdiff_weights(view.gram.diagonal().clamp(min=0).sqrt(), roles)
