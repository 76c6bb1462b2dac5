"""Networks for dense prediction and faces by name, as protocols and the command line name them.

Each entry takes the channels (or logits) of every task. What each shares, and where its one shared
representation is, stands with the network itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from .branched_models import MTAN, small_cross_stitch, small_mmoe
from .hard_models import celeba_net, deeplab, pspnet, resnet18_faces, segnet, unet

NETWORKS: dict[str, Callable[[Sequence[int]], nn.Module]] = {
    "segnet": segnet,
    "mtan": MTAN,
    "pspnet": pspnet,
    "pspnet_pretrained": partial(pspnet, pretrained=True),
    "deeplab": deeplab,
    "deeplab_pretrained": partial(deeplab, pretrained=True),
    "unet": unet,
    "cross_stitch": small_cross_stitch,
    "mmoe": small_mmoe,
    "celeba_net": celeba_net,
    "celeba_net_pascal": partial(celeba_net, bias=True, running=False),
    "resnet18": resnet18_faces,
}
