"""Published protocols on NYUv2, Cityscapes and CelebA, as data.

Each stands under the name that ``--protocol`` takes. Where a paper and its code disagree, the note
says which of the two stands here; where something cannot be repeated, the note says so. Not here:
the dense runs of IMTL (crops of 401 and 713 pixels, 16 GPUs, sliding windows in the evaluation) and
those of Pascal et al. on NYUv2 (another copy of the data).

Delta m of the MTAN protocols is the mean over all metrics, as Nash-MTL and its followers print it;
Aligned-MTL prints that and the mean over tasks, ExcessMTL's library the mean over tasks alone, with
the opposite sign.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Protocol

_MTAN = Protocol(
    epochs=200,
    batch_size=2,
    lr=1e-4,
    schedule="step",
    steps=(100,),
    average=10,
    network="mtan",
    single_network="segnet",
    size=(288, 384),
    augment=True,
    evaluation="papers",
    note="MTAN's protocol as Nash-MTL, FAMO and FairGrad run it: with augmentation, which MTAN's "
    "own tables are without",
)

_PSPNET = replace(
    _MTAN,
    network="pspnet_pretrained",
    single_network="",
    note="Aligned-MTL's paper; its code runs 40 epochs and halves the rate every 20",
)

NYUV2: dict[str, Protocol] = {
    "mtan": _MTAN,
    "segnet": replace(_MTAN, network="segnet", single_network=""),
    "pspnet": _PSPNET,
    "deeplab": Protocol(
        epochs=200,
        batch_size=8,
        lr=1e-4,
        network="deeplab_pretrained",
        size=(288, 384),
        augment=True,
        evaluation="papers",
        delta_m="tasks",
        note="ExcessMTL's code, with LibMTL's network; it reports the best epoch on the test set, "
        "here the last",
    ),
}
"""Three tasks, 795 images to train with and 654 to test with, in MTAN's files."""

CITYSCAPES: dict[str, Protocol] = {
    "mtan": replace(_MTAN, batch_size=8, size=(128, 256)),
    "segnet": replace(_MTAN, batch_size=8, size=(128, 256), network="segnet", single_network=""),
}
"""Two tasks, seven classes and inverse depth, 2,975 and 500 images, in MTAN's files."""

CITYSCAPES_THREE: dict[str, Protocol] = {
    "pspnet": Protocol(
        epochs=100,
        batch_size=8,
        lr=1e-4,
        schedule="step",
        steps=tuple(range(42, 100, 3)),
        decay=0.7,
        report="best",
        network="pspnet_pretrained",
        size=(256, 512),
        augment=True,
        note="Aligned-MTL's paper (100 epochs) with its code's schedule, which runs 60; the code "
        "picks the epoch by the loss on the images it is tested with, here by their scores, and "
        "trains on targets of an eighth of the size",
    ),
}
"""Three tasks, 19 classes, instance offsets and disparity, in Cityscapes' own folders."""

_FAMO = Protocol(
    epochs=15,
    batch_size=256,
    lr=3e-4,
    report="best",
    network="celeba_net",
    size=(64, 64),
    delta_m="first",
    note="FAMO's code; the epoch with the best mean F1 on validation images",
)

CELEBA: dict[str, Protocol] = {
    "famo": _FAMO,
    "pascal": replace(
        _FAMO,
        lr=1e-3,
        rates=(1e-4, 5e-4, 1e-3),
        network="celeba_net_pascal",
        delta_m="metrics",
        note="The code of Pascal et al., whose commands take 1e-3 for joint, 5e-4 or 1e-4 for "
        "independent updates; it picks the epoch by the summed validation loss, here by F1",
    ),
    "imtl": Protocol(
        epochs=100,
        batch_size=256,
        lr=2e-2,
        optimizer="sgd",
        weight_decay=1e-4,
        schedule="poly",
        network="resnet18",
        size=(218, 178),
        note="IMTL's appendix; it names no learning rate for CelebA, 0.02 is that of its "
        "Cityscapes, and it tests on the validation images, here on the test images",
    ),
}
"""40 binary tasks, the official splits."""

PASCAL_SEGMENTATION = Protocol(
    epochs=150,
    batch_size=24,
    lr=1e-3,
    rates=(5e-4, 1e-3),
    report="best",
    network="unet",
    note="The code of Pascal et al. for binary segmentation tasks: 1e-3 for joint updates and "
    "individual optimisers, 5e-4 for independent updates; it picks the epoch by the summed "
    "validation loss, here by IoU",
)
"""A network for binary segmentation tasks, one per class; in the paper's code on Cityscapes."""
