"""Run one weighting of LibMTL on a toy, without the rest of LibMTL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_tutorial.speed.contenders import libmtl_class


def weighting_class(name: str) -> type[nn.Module]:
    """A weighting of the installed LibMTL, for example "PCGrad"; skips the test without LibMTL."""
    try:
        return libmtl_class(name)
    except ImportError as error:
        pytest.skip(f"{error}; do: pip install -e '.[test]'")


@dataclass
class Step:
    """What one backward of a weighting left.

    Attributes:
        direction: gradient of the shared parameters (P,).
        heads: gradient of each task's own parameter (K,).
        weights: what the weighting reports, or None.
    """

    direction: Tensor
    heads: Tensor
    weights: Tensor | None


class Toy(nn.Module):
    """What a weighting expects around itself: shared parameters, tasks, an epoch, a device.

    The losses are ``L_k = J_k . theta + phi_k + offset_k`` at theta = 0, phi = 0.
    """

    rep_grad = False
    epoch = 0
    device = torch.device("cpu")

    def set_up(self, k: int, p: int) -> None:
        self.task_num = k
        self.task_name = [str(i) for i in range(k)]
        self.theta = nn.Parameter(torch.zeros(p))
        self.phi = nn.Parameter(torch.zeros(k))
        self.init_param()

    def get_share_params(self) -> list[nn.Parameter]:
        return [self.theta]

    def zero_grad_share_params(self) -> None:
        self.theta.grad.zero_()


class Weighting:
    """One weighting of LibMTL on toys of K tasks and P shared parameters.

    Args:
        name: LibMTL's class.
        k: number of tasks.
        p: number of shared parameters.
        **arguments: what LibMTL passes to `backward` from its command line.
    """

    def __init__(self, name: str, k: int, p: int, **arguments: Any) -> None:
        self.model = type(name, (weighting_class(name), Toy), {})()
        self.model.set_up(k, p)
        self.arguments = arguments

    def step(self, jacobian: Tensor, losses: Tensor | None = None) -> Step:
        """Backward at the given Jacobian (K, P) and losses (K,), which are ones by default."""
        model = self.model
        losses = torch.ones(len(jacobian)) if losses is None else losses
        model.zero_grad()
        # Some weightings fill a gradient that they expect to be there.
        model.theta.grad = torch.zeros_like(model.theta)
        weights = model.backward(jacobian @ model.theta + model.phi + losses, **self.arguments)
        return Step(
            model.theta.grad.clone(),
            model.phi.grad.clone(),
            None if weights is None else torch.as_tensor(weights, dtype=torch.float64),
        )

    def features_step(self, jacobian: Tensor, features: Tensor) -> Tensor:
        """Gradient of the shared representation (1, P), of which the losses are linear."""
        model = self.model
        model.rep_grad = True
        model.rep = features[None].clone().requires_grad_()
        model.rep_tasks = {
            task: model.rep.detach().clone().requires_grad_() for task in model.task_name
        }
        losses = [row @ z[0] for row, z in zip(jacobian, model.rep_tasks.values(), strict=True)]
        model.backward(torch.stack(losses), **self.arguments)
        return model.rep.grad[0]
