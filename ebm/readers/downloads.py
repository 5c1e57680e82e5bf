"""Import torchvision, also if its compiled part does not load."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, also if its compiled operators do not load because torch is of another build.

    The Python parts of torchvision can then be imported after these operators have been declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is not None and spec.origin and "torchvision" not in sys.modules:
        with contextlib.suppress(OSError):
            for library in pathlib.Path(spec.origin).parent.glob("_C.*"):
                torch.ops.load_library(library)
        if not hasattr(torch.ops.torchvision, "nms"):
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
