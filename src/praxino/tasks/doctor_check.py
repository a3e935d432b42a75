"""What the doctor finds."""

from dataclasses import dataclass
from typing import Literal

Colour = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Check:
    """One finding; `value` is what was measured, NaN where nothing could be."""

    name: str
    value: float
    colour: Colour
    detail: str
