"""The seam of the toy landscape, where the start point (0, 0) lies."""

from __future__ import annotations

import math

import torch

from mtl_tutorial.benchmarks import toy_losses


def test_start_point_on_the_seam_moves():
    # On x2 = 0 both switches have slope 1/2 of their sign, so that dL/dx2 is half of valley - bowl.
    gradients = torch.autograd.functional.jacobian(toy_losses, torch.zeros(2, dtype=torch.float64))
    bowl = (49 + 6.4) / 10 - 20
    valleys = math.log(7 / 2) + 6, math.log(7 / 2) + 6
    expected = torch.tensor([[0.0, (v - bowl) / 2] for v in valleys], dtype=torch.float64)
    torch.testing.assert_close(gradients, expected)
