"""Networks of the papers on dense prediction and faces, with hard parameter sharing.

Each builder takes the channels (or logits) of every task and gives a `HardSharing`: the trunk is
shared, its output z is the representation for the feature level, each head belongs to its task.
Images are floats (N, 3, H, W); a dense head gives a map (N, C_k, H, W), a CelebA head a logit
(N, C_k). No head squashes or normalises its output: a softmax, a sigmoid or a unit normal is the
loss's and the metric's business. Networks that share otherwise are in `branched_models`, and all of
them by name in `dense_models`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from .models import HardSharing

SEGNET_WIDTHS = (64, 128, 256, 512, 512)
UNET_WIDTHS = (64, 128, 256, 512, 512)
IMAGENET = "IMAGENET1K_V1"  # the weights that the reference implementations load


def conv_block(
    c_in: int, c_out: int, *, stride: int = 1, bias: bool = True, running: bool = True
) -> nn.Sequential:
    """3x3 convolution that keeps the size (times 1 / stride), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=bias),
        nn.BatchNorm2d(c_out, track_running_stats=running),
        nn.ReLU(inplace=True),
    )


def map_head(c_in: int, c_out: int) -> nn.Sequential:
    """3x3 and 1x1 convolution with nothing between them: MTAN's prediction layers."""
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 1))


def xavier(network: nn.Module) -> None:
    """MTAN's initialisation: Xavier normal weights, no bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Enlarged(nn.Module):
    """A head whose map is enlarged to the image's size, bilinearly.

    Args:
        head: z to a coarse map.
        factor: pixels of the image per pixel of the map, in height and in width.
    """

    def __init__(self, head: nn.Module, factor: int) -> None:
        super().__init__()
        self.head = head
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(
            self.head(z), scale_factor=self.factor, mode="bilinear", align_corners=False
        )


class Multiples(nn.Module):
    """Passes images whose sides are multiples of `factor`, so that maps come out at their size."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if any(side % self.factor for side in x.shape[-2:]):
            raise ValueError(
                f"expected images whose sides are multiples of {self.factor}, got "
                f"{tuple(x.shape[-2:])}; resize or crop them"
            )
        return x


# ------------------------------------------------------------------------------- SegNet


class Stage(nn.Module):
    """An entry block and `n` more blocks; gives the entry's and the last block's output."""

    def __init__(self, c_in: int, width: int, n: int) -> None:
        super().__init__()
        self.entry = conv_block(c_in, width)
        self.rest = nn.Sequential(*(conv_block(width, width) for _ in range(n)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        entry = self.entry(x)
        return entry, self.rest(entry)


class SegNetTrunk(nn.Module):
    """SegNet of Badrinarayanan et al. (2017) as MTAN uses it: five stages down, five stages up.

    A stage is an entry block and one more block (two more from the third stage on). Going up, a
    stage puts each value back where the matching pooling found its maximum.

    Args:
        c_in: channels of the image.
        widths: channels of the five stages.
    """

    def __init__(self, c_in: int = 3, widths: Sequence[int] = SEGNET_WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        above = (self.widths[0], *self.widths[:-1])  # what a stage gives to the one above it
        below = (c_in, *self.widths[:-1])
        depth = [1 if j < 2 else 2 for j in range(len(widths))]
        self.down = nn.ModuleList(map(Stage, below, self.widths, depth))
        self.up = nn.ModuleList(map(Stage, self.widths, above, depth))
        xavier(self)

    def stages(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Tensors that attention looks at.

        Returns:
            Going down, per stage the entry's and the stage's output; and, indexed alike, going up,
            per stage its input and its output. The first entry of the second list is z.
        """
        least = 2 ** len(self.widths)
        if min(x.shape[-2:]) < least:
            raise ValueError(
                f"expected images of {least} x {least} pixels or more, since SegNet halves them "
                f"{len(self.widths)} times, got {tuple(x.shape)}; use larger ones"
            )
        down, places = [], []
        for stage in self.down:
            entry, whole = stage(x)
            down.append((entry, whole))
            x, index = F.max_pool2d(whole, 2, return_indices=True)
            places.append((index, whole.shape[-2:]))
        up = []
        for stage, (index, size) in zip(reversed(self.up), reversed(places), strict=True):
            spread = F.max_unpool2d(x, index, [2, 2], output_size=size)
            _, x = stage(spread)
            up.append((spread, x))
        return down, up[::-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[1][0][1]


def segnet(
    n_outputs: Sequence[int], c_in: int = 3, widths: Sequence[int] = SEGNET_WIDTHS
) -> HardSharing:
    """SegNet that splits at its last layer; the single-task network of the MTAN protocol.

    Shared: both halves, 24,943,296 parameters. z: (N, 64, H, W). With one head of 13 classes it
    has the 24,981,069 parameters that MTAN's code counts in.

    Args:
        n_outputs: channels of each task's map.
        c_in: channels of the image.
        widths: channels of the five stages.
    """
    heads = [map_head(widths[0], c) for c in n_outputs]
    network = HardSharing(SegNetTrunk(c_in, widths), heads)
    xavier(network.heads)
    return network


# ------------------------------------------------------------------------------- dilated ResNet


def dilated_resnet50(pretrained: bool = False) -> nn.Sequential:
    """ResNet-50 whose last two stages dilate in place of striding: 2048 channels at 1/8 size.

    With `pretrained`, torchvision downloads ImageNet weights.
    """
    weights = IMAGENET if pretrained else None
    net = resnet50(weights=weights, replace_stride_with_dilation=[False, True, True])
    stem = [Multiples(8), net.conv1, net.bn1, net.relu, net.maxpool]
    return nn.Sequential(*stem, net.layer1, net.layer2, net.layer3, net.layer4)


class PyramidHead(nn.Module):
    """PSPNet's head (Zhao et al. 2017): z beside its means over four grids, then convolutions.

    In training a batch of one image fails, since batch norm behind the 1x1 grid has one value.

    Args:
        c_in: channels of z.
        c_out: channels of the map.
        width: channels of each grid's branch and of the hidden layer.
        grids: side of each grid.
    """

    def __init__(
        self, c_in: int, c_out: int, width: int = 512, grids: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(grid),
                nn.Conv2d(c_in, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for grid in grids
        )
        self.last = nn.Sequential(
            conv_block(c_in + len(grids) * width, width, bias=False), nn.Conv2d(width, c_out, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        pooled = [
            F.interpolate(branch(z), size=z.shape[-2:], mode="bilinear", align_corners=False)
            for branch in self.branches
        ]
        return self.last(torch.cat([z, *pooled], 1))


def pspnet(n_outputs: Sequence[int], pretrained: bool = False) -> HardSharing:
    """Dilated ResNet-50 with a pyramid head per task, as MGDA-UB, IMTL and Aligned-MTL use it.

    Shared: the ResNet, 23,508,032 parameters. z: (N, 2048, H / 8, W / 8). A head has 23.1 million.
    Sides are multiples of 8. Aligned-MTL's code repeats pixels where this enlarges bilinearly, as
    PSPNet's paper does.

    Args:
        n_outputs: channels of each task's map.
        pretrained: start the trunk from ImageNet weights, which torchvision downloads.
    """
    heads = [Enlarged(PyramidHead(2048, c), 8) for c in n_outputs]
    return HardSharing(dilated_resnet50(pretrained), heads)


def deeplab(n_outputs: Sequence[int], pretrained: bool = False) -> HardSharing:
    """Dilated ResNet-50 with a DeepLabV3 head per task, as LibMTL and ExcessMTL use it.

    Shared: the ResNet, 23,508,032 parameters. z: (N, 2048, H / 8, W / 8). The head is torchvision's
    (rates 12, 24, 36), about 16.1 million parameters each. Sides are multiples of 8.

    Args:
        n_outputs: channels of each task's map.
        pretrained: start the trunk from ImageNet weights, which torchvision downloads.
    """
    heads = [Enlarged(DeepLabHead(2048, c), 8) for c in n_outputs]
    return HardSharing(dilated_resnet50(pretrained), heads)


# ------------------------------------------------------------------------------- U-Net


class UNetTrunk(nn.Module):
    """U-Net (Ronneberger et al. 2015) with bilinear upsampling and batch statistics at any time.

    Args:
        c_in: channels of the image.
        widths: channels going down. Going up, each stage gives the width below the one that it
            joins, and the last the first width.
    """

    def __init__(self, c_in: int = 3, widths: Sequence[int] = UNET_WIDTHS) -> None:
        super().__init__()

        def double(a: int, b: int, c: int) -> nn.Sequential:
            return nn.Sequential(conv_block(a, b, running=False), conv_block(b, c, running=False))

        below = (c_in, *widths[:-1])
        self.down = nn.ModuleList(double(a, b, b) for a, b in zip(below, widths, strict=True))
        self.up = nn.ModuleList()
        width = widths[-1]
        for j in reversed(range(len(widths) - 1)):
            joined = width + widths[j]
            width = widths[max(j - 1, 0)]
            self.up.append(double(joined, joined // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for j, stage in enumerate(self.down):
            x = stage(x if j == 0 else F.max_pool2d(x, 2))
            found.append(x)
        for stage, skip in zip(self.up, reversed(found[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = stage(torch.cat([skip, x], 1))
        return x


def unet(
    n_outputs: Sequence[int], c_in: int = 3, widths: Sequence[int] = UNET_WIDTHS
) -> HardSharing:
    """U-Net of Pascal et al. with a 1x1 convolution per task.

    Shared: both halves, 17,267,328 parameters. z: (N, 64, H, W). Where the image's side is no
    multiple of 16, the official code pads an upsampled map; this resizes it to the size wanted.

    Args:
        n_outputs: channels of each task's map.
        c_in: channels of the image.
        widths: channels going down.
    """
    return HardSharing(UNetTrunk(c_in, widths), [nn.Conv2d(widths[0], c, 1) for c in n_outputs])


# ------------------------------------------------------------------------------- faces


def celeba_net(
    n_outputs: Sequence[int], bias: bool = False, running: bool = True, width: int = 64
) -> HardSharing:
    """The CelebA network of Pascal et al., FAMO and their followers, for images of 64x64.

    Seven convolutions, a mean over the map and two hidden layers are shared; a head is linear.
    Shared: 5,176,640 parameters (FAMO). z: (N, 512).

    Args:
        n_outputs: logits of each task, 1 for an attribute.
        bias: of the hidden layers; Pascal et al. have one (1,024 parameters more), FAMO none.
        running: whether batch norm keeps running statistics for evaluation. FAMO's does, that of
            Pascal et al. uses the statistics of the batch in evaluation as well.
        width: channels of the first convolution; the others have 2, 4 and 8 times as many.
    """
    w = width
    stages = [[(3, w)], [(w, 2 * w), (2 * w, 2 * w)], [(2 * w, 4 * w), (4 * w, 4 * w)]]
    layers: list[nn.Module] = []
    for stage in stages:
        layers += [conv_block(a, b, bias=False, running=running) for a, b in stage]
        layers.append(nn.MaxPool2d(2))
    for a, b in [(4 * w, 8 * w), (8 * w, 8 * w)]:
        layers.append(conv_block(a, b, bias=False, running=running))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        layers += [
            nn.Linear(8 * w, 8 * w, bias=bias),
            nn.BatchNorm1d(8 * w, track_running_stats=running),
            nn.ReLU(inplace=True),
        ]
    return HardSharing(nn.Sequential(*layers), [nn.Linear(8 * w, c) for c in n_outputs])


def resnet18_faces(n_outputs: Sequence[int]) -> HardSharing:
    """ResNet-18 from scratch with linear heads: the CelebA network of IMTL, for 218x178 images.

    Shared: 11,176,512 parameters. z: (N, 512).

    Args:
        n_outputs: logits of each task, 1 for an attribute.
    """
    trunk = resnet18(weights=None)
    trunk.fc = nn.Identity()
    return HardSharing(trunk, [nn.Linear(512, c) for c in n_outputs])
