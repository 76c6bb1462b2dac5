"""The solvers for accelerators, run on the CPU: the steps are those of the host's solvers.

Weights are compared by the step they make, in units of its length: where gradients are linearly
dependent, several weights make one step.
"""

from __future__ import annotations

import pytest
import torch
from helpers import gaussian
from torch import Tensor

from mtl_tutorial import device_solvers, solvers
from mtl_tutorial.methods import aligned_mtl, config, dualproj, sdmgrad, upgrad


def rows(k: int, p: int, seed: int, ratio: float = 1.0, common: float = 0.0) -> Tensor:
    """Rows whose norms are spread over `ratio`, plus `common` times one vector of either sign."""
    j = gaussian(k, p, seed) + common * gaussian(k, 1, seed + 1).sign() * gaussian(1, p, seed + 2)
    exponents = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exponents[0], exponents[-1] = 0.0, 1.0
    return torch.nn.functional.normalize(j, dim=1) * ratio ** exponents[:, None]


RULES = {
    "imtl_g": solvers.equal_projection_weights,
    "mgda": solvers.min_norm_weights,
    "sdmgrad": lambda gram: sdmgrad.sdmgrad_weights(gram, 0.3),
    "nash_mtl": lambda gram: solvers.balanced_weights(gram, 1.0),
    "fairgrad 0.3": lambda gram: solvers.balanced_weights(gram, 0.3),
    "fairgrad 2": lambda gram: solvers.balanced_weights(gram, 2.0),
    "fairgrad 5": lambda gram: solvers.balanced_weights(gram, 5.0),
    "aligned_mtl": lambda gram: aligned_mtl.aligned_weights(gram),
    "aligned_mtl rmse": lambda gram: aligned_mtl.aligned_weights(gram, scale="rmse"),
    "config": lambda gram: config.config_weights(gram),
    "config 1 2 3": lambda gram: config.config_weights(
        gram, torch.arange(len(gram), dtype=torch.float64) % 3 + 1
    ),
    "upgrad": upgrad.upgrad_weights,
    "dualproj": dualproj.dualproj_weights,
}
every = pytest.mark.parametrize("rule", list(RULES))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Call a rule as on an accelerator."""

    def call(rule, gram: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(solvers, "_elsewhere", lambda x: device_solvers)
            for module in (aligned_mtl, config):
                patch.setattr(module, "on_host", lambda device: False)
            return rule(gram)

    return call


def error(here: Tensor, there: Tensor, j: Tensor) -> float:
    return float((there @ j - here @ j).norm() / (here @ j).norm())


@every
@pytest.mark.parametrize("k", [2, 3, 10, 40])
def test_the_steps_are_those_of_the_host(elsewhere, rule: str, k: int) -> None:
    """To 1e-9, for norms spread over 1e3, with and without conflicts."""
    for seed, (ratio, common) in enumerate([(1.0, 0.0), (1e3, 0.0), (1.0, 1.0), (1e3, 1.0)]):
        j = rows(k, 400, seed, ratio, common)
        gram = j @ j.T
        here, there = RULES[rule](gram), elsewhere(RULES[rule], gram)
        assert error(here, there, j) < 1e-9, (ratio, common)
