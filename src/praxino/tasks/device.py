"""The device and the precision of a task."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

from praxino.errors import ConfigError

Precision = Literal["32", "bf16"]
FLOAT32 = "without TF32"  # what `precision_context` sees to, for protocols


def pick_device(device: str) -> torch.device:
    """Return the device of a name; `auto` takes an accelerator where there is one."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


@contextmanager
def precision_context(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute under autocast if the precision is bf16; what is in float32 is never in TF32, cuDNN's default."""
    tf32, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(products)
