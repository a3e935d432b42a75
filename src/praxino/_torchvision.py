"""Let a CUDA build of torchvision import beside a CPU build of torch.

PyPI's torchvision wheel links CUDA libraries. Beside a CPU torch its extension cannot load, and the Python side then
dies on `operator torchvision::nms does not exist`, which takes torchmetrics, lpips and lightning with it. Nothing of
praxino calls these operators; declaring their schemas is enough. torch loads this module at the end of its own import
through the `torch.backends` entry point, so every process of the environment is covered.
"""

import importlib.util

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # kept for the life of the process: a collected Library takes its schemas back


def declare_operators() -> None:
    """Declare the schemas if torch has no CUDA and torchvision is installed; else do nothing."""
    global _library
    import torch

    if _library is not None or torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
