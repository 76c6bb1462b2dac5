"""Networks with a shared trunk and one head per task.

A model tells which parameters are shared, which belong to which head, and gives its shared
representation, because gradient balancing needs all three. It knows no loss and no method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn


class ToUnit(nn.Module):
    """Bytes 0 to 255 to floats 0 to 1, so that images can stay bytes on the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


class HardSharing(nn.Module):
    """One trunk, K heads: hard parameter sharing.

    Args:
        trunk: input to the shared representation z.
        heads: z to the output of each task.
    """

    def __init__(self, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def features(self, x: Tensor) -> Tensor:
        """Shared representation z of a batch."""
        return self.trunk(x)

    def outputs(self, z: Tensor, tasks: Sequence[int] | None = None) -> list[Tensor]:
        """Outputs of the given tasks' heads (default all), in their order."""
        chosen = range(len(self.heads)) if tasks is None else tasks
        return [self.heads[k](z) for k in chosen]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of all tasks."""
        return self.outputs(self.features(x))

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [list(head.parameters()) for head in self.heads]


class Separate(nn.Module):
    """K networks side by side that share nothing: the single-task baseline.

    Trained on the sum of the losses with an optimiser that works per coordinate (Adam, SGD), each
    network takes exactly the steps it would take alone.

    Args:
        build: makes a network whose heads are those of all tasks; network k keeps head k alone.
        n_tasks: number of tasks K.
    """

    def __init__(self, build: Callable[[], HardSharing], n_tasks: int) -> None:
        super().__init__()
        networks = [build() for _ in range(n_tasks)]
        self.networks = nn.ModuleList(
            HardSharing(net.trunk, [net.heads[k]]) for k, net in enumerate(networks)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of all tasks, each from its own network."""
        return [net(x)[0] for net in self.networks]

    def shared_parameters(self) -> list[nn.Parameter]:
        return []

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [list(net.parameters()) for net in self.networks]


def small_convnet(
    side: int, n_classes: Sequence[int], width: int = 8, hidden: int = 32
) -> HardSharing:
    """LeNet-like network for small grey images: two 3x3 convolutions, one hidden layer.

    Args:
        side: height and width of the images in pixels.
        n_classes: classes of each task.
        width: channels of the first convolution; the second has twice as many.
        hidden: size of the shared representation.
    """
    after = (side // 2) // 2
    trunk = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * after * after, hidden),
        nn.ReLU(),
    )
    return HardSharing(trunk, [nn.Linear(hidden, c) for c in n_classes])


def count_parameters(parameters: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Number of scalars in the given parameters."""
    return sum(p.numel() for p in parameters)
