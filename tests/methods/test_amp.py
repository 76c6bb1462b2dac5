"""Training under autocast, float16 with a gradient scaler and bfloat16, for every method.

test_suite.py spoils losses and gradients one by one; here the half-precision forward pass itself
makes them, and overflows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BadGradient, Regression, assert_equal_state, relative_error, sgd

from mtl_tutorial.methods import CLASSES, available, create

every = pytest.mark.parametrize("name", available())


def tasks_of(name):
    return CLASSES[name].n_tasks or 3


class Run:
    """A float32 model whose forward pass is in half precision, as training loops write it."""

    def __init__(self, name, dtype, scale=None):
        self.model = Regression(tasks_of(name), dtype=torch.float32)
        self.method = create(name)
        self.optimizer = sgd(self.model.parameters(), lr=0.01, momentum=0.9)
        self.dtype = dtype
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        self.start = self.parameters()

    def parameters(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def step(self, batch):
        def closure():
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
                return self.model(batch) / 16  # so that gradients times 65536 fit in float16

        return self.method.step(
            closure,
            self.optimizer,
            shared=list(self.model.trunk.parameters()),
            heads=[list(head.parameters()) for head in self.model.tasks],
            scaler=self.scaler,
        )

    def moved(self, steps=4):
        for batch in range(steps):
            assert self.step(batch).finite
        return self.parameters() - self.start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every
def test_autocast_takes_nearly_the_steps_of_float32(name, dtype):
    run = Run(name, dtype, 1024.0 if dtype == torch.float16 else None)
    moved = run.moved()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    # Measured: at most 7e-4 and 7e-3, a unit in the last place of each type.
    tolerance = 5e-3 if dtype == torch.float16 else 3e-2
    assert 0 < relative_error(moved, Run(name, torch.float32).moved()) < tolerance


@every
def test_float16_scale_leaves_the_update_the_same(name):
    """Float16 rounds gradients times a power of two as the gradients, down to 6e-5."""
    once, scaled = (Run(name, torch.float16, scale).moved() for scale in (1.0, 65536.0))
    assert relative_error(scaled, once) < 1e-3


@every
def test_float16_overflow_is_skipped_until_the_scale_fits(name):
    """By a trunk's gradient or by a head's alone; the scaler asks both."""
    run = Run(name, torch.float16, 2.0**40)
    several = CLASSES[name].family == "schedule" and name not in ("joint", "cross_learning")
    for batch in range(60):
        scale, before = run.scaler.get_scale(), run.parameters()
        state = copy.deepcopy(run.method.state_dict())
        if run.step(batch).finite:
            break
        assert run.scaler.get_scale() < scale
        if several:  # a group whose gradients fit has stepped
            continue
        assert torch.equal(run.parameters(), before)
        if batch:  # before the first step there is no state
            assert_equal_state(run.method.state_dict(), state)
    assert 5 < batch < 40
    assert run.scaler.get_scale() == scale
    assert not torch.equal(run.parameters(), before) or name == "config_momentum"
    assert run.parameters().isfinite().all()


@every
def test_overflow_behind_the_features_leaves_the_state(name):
    """At the feature level the trunk is differentiated after the rule has had its say."""
    if not CLASSES[name].feature_level or CLASSES[name].family == "schedule":
        pytest.skip("no feature level")
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(batch, bad):
        def closure():
            z = model.features(batch)
            z = BadGradient.apply(z) if bad else z
            return model.losses_from(z, batch), z

        return method.step(closure, optimizer, shared=list(model.trunk.parameters()), scaler=scaler)

    assert step(0, False).finite
    state = copy.deepcopy(method.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    assert not step(1, True).finite
    assert scaler.get_scale() == 512.0
    assert_equal_state(method.state_dict(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert step(2, False).finite
