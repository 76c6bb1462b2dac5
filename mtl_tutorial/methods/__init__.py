"""Methods that turn K task losses into one step; one readable file per paper.

`available` names them, `create` makes one by its name. A method that is added to `CLASSES` is
listed, documented and tested with all others.
"""

from __future__ import annotations

import inspect
from typing import Any

from .. import names
from ..gradients import Info, Method
from .aligned_mtl import AlignedMTL
from .cagrad import CAGrad
from .config import ConFIG, ConFIGMomentum
from .cross_learning import CrossLearning
from .db_mtl import DBMTL
from .dualproj import DualProj
from .dwa import DWA
from .equal import Equal
from .excess_mtl import ExcessMTL
from .fairgrad import FairGrad
from .famo import FAMO
from .gen_lr import GeNLR
from .geometric import Geometric
from .graddrop import GradDrop
from .gradnorm import GradNorm
from .gradvac import GradVac
from .group_dro import GroupDRO
from .imtl import IMTL, IMTLG, IMTLL
from .independent import Independent, Individual, Joint
from .mgda import MGDA
from .nash_mtl import NashMTL
from .ngdiff import NGDiff
from .pcgrad import PCGrad
from .rlw import RLW
from .scale_invariant import ScaleInvariant
from .sdmgrad import SDMGrad
from .slaw import SLAW
from .stch import STCH
from .uncertainty import Uncertainty
from .upgrad import UPGrad

__all__ = [
    "CLASSES",
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "RLW",
    "SLAW",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "ConFIGMomentum",
    "CrossLearning",
    "DualProj",
    "Equal",
    "ExcessMTL",
    "FairGrad",
    "GeNLR",
    "Geometric",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GroupDRO",
    "Independent",
    "Individual",
    "Info",
    "Joint",
    "Method",
    "NGDiff",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "ScaleInvariant",
    "UPGrad",
    "Uncertainty",
    "available",
    "create",
]

CLASSES: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Equal,
        ExcessMTL,
        AlignedMTL,
        IMTLG,
        IMTLL,
        IMTL,
        Independent,
        Individual,
        Joint,
        DWA,
        FAMO,
        Geometric,
        GradNorm,
        GroupDRO,
        RLW,
        ScaleInvariant,
        SLAW,
        STCH,
        Uncertainty,
        ConFIG,
        ConFIGMomentum,
        CrossLearning,
        DBMTL,
        GradDrop,
        GradVac,
        NGDiff,
        PCGrad,
        MGDA,
        CAGrad,
        NashMTL,
        FairGrad,
        SDMGrad,
        UPGrad,
        DualProj,
    )
}


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(CLASSES)


def create(name: str, **settings: Any) -> Method:
    """Make a method by its name.

    Args:
        name: one of `available`.
        **settings: keyword arguments of the method's class, for example ``scale="median"``.

    Raises:
        ValueError: no method of that name, with the nearest names; or a setting's value is bad.
        TypeError: the method has no such setting, with the nearest setting and all settings.
    """
    if name not in CLASSES:
        raise ValueError(f"no method {name!r}; {names.nearest(name, available(), 'methods')}")
    valid = list(inspect.signature(CLASSES[name]).parameters)
    for setting in settings:
        if setting not in valid:
            raise TypeError(
                f"method {name!r} has no setting {setting!r}; "
                f"{names.nearest(setting, valid, 'settings')}"
            )
    return CLASSES[name](**settings)
