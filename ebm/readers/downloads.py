"""Import torchvision, also if its compiled part does not load."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, also if its compiled operators do not load because torch is of another build.

    The Python parts of torchvision can then be imported after these operators have been declared.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]  # what the import that failed has left
    declare_operators()
    return importlib.import_module("torchvision")


_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def declare_operators() -> None:
    """Declare the compiled operators of torchvision without an implementation."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "qroi_align"):
        library.define(f"{name}() -> ()")
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}() -> ()")
        library.define(f"_{name}_backward() -> ()")
    _declared.append(library)
