"""The code that the README shows runs as it stands, in a plain PyTorch loop."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def plain_loop():
    """What a reader has before the change: a model with a trunk, a loader, an optimiser."""
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
    model.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    model.forward = lambda x: [head(model.trunk(x)) for head in model.heads]

    def task_losses(outputs, y):
        return torch.stack([F.mse_loss(out[:, 0], y[:, k]) for k, out in enumerate(outputs)])

    x = torch.randn(64, 5)
    y = torch.stack([x[:, 0] * 3, -x[:, 0] + x[:, 1]], 1)
    loader = [(x, y)] * 50
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return {"model": model, "loader": loader, "task_losses": task_losses, "optimizer": optimizer}


def test_the_drop_in_use_trains_every_parameter():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "loader" in b]
    names = plain_loop()
    before = {k: v.clone() for k, v in names["model"].state_dict().items()}
    x, y = names["loader"][0]
    first = names["task_losses"](names["model"](x), y).detach()
    exec(block, names)
    last = names["task_losses"](names["model"](x), y).detach()
    assert (last < first).all()
    after = names["model"].state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before)


def test_the_change_is_two_lines_of_an_ordinary_loop():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "loader" in b]
    changed = [line for line in block.splitlines() if "method" in line and "import" not in line]
    assert len(changed) == 2
    rest = "\n".join(line for line in block.splitlines() if "method" not in line)
    ordinary = rest.replace(
        "    optimizer.step()", "    losses.sum().backward()\n    optimizer.step()"
    )
    names = plain_loop()
    exec(ordinary, names)  # the loop works with the plain sum in their place
