"""What jobs/compare.py compares: a model with its settings, written as ``MODEL,key=value,...``."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jobs.runtime.image_size import parse_size
from mmcore.errors import InputError

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Source:
    """A model and the settings that decide its time."""

    model: str
    """``sdxl``, ``infinity-2b`` or ``infinity-8b``."""
    steps: int = 50
    """Steps of a diffusion. Infinity has none."""
    guided: int | None = None
    """Steps, or grids of Infinity, with guidance. None guides all."""
    batch: int = 1
    """Images together."""
    size: str = "1024x1024"
    """WIDTHxHEIGHT in pixels."""
    dtype: Dtype = "bfloat16"
    """Precision of the weights."""
    seconds: float | None = None
    """Seconds an image that somebody claims or has measured. The share of the peak that they need is computed."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"source {self}: {name} must be at least 1")
        if self.model.startswith("infinity") and self.steps != Source.steps:
            raise InputError(f"source {self}: Infinity has no steps; leave them out")
        if self.guided is not None and not 0 <= self.guided <= self.steps:
            raise InputError(f"source {self}: guided must be from 0 to the {self.steps} steps")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError(f"source {self}: seconds must be above 0 and finite")
        if self.dtype not in get_args(Dtype):
            raise InputError(f"source {self}: dtype must be one of {', '.join(get_args(Dtype))}")
        if parse_size(self.size) is None:
            raise InputError(f"source {self}: size must be WIDTHxHEIGHT, such as 1024x1024")

    @property
    def height_width(self) -> tuple[int, int]:
        size = parse_size(self.size)
        assert size is not None, "checked at the start"
        return size

    def __str__(self) -> str:
        given = [
            f"{field.name}={value}"
            for field in dataclasses.fields(self)[1:]
            if (value := getattr(self, field.name)) != field.default
        ]
        return ",".join([self.model, *given])


_TYPES: dict[str, Any] = {"steps": int, "guided": int, "batch": int, "size": str, "dtype": str, "seconds": float}


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises InputError for a setting that is not known or has a wrong value."""
    model, *settings = text.split(",")
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in _TYPES or not equals:
            raise InputError(f"source {text!r}: {setting!r} is no setting; write one of {'=, '.join(_TYPES)}=")
        if name in values:
            raise InputError(f"source {text!r}: {name} is given twice")
        try:
            values[name] = _TYPES[name](value)
        except ValueError:
            kind = "a whole number" if _TYPES[name] is int else "a number"
            raise InputError(f"source {text!r}: {name}={value} must be {kind}") from None
    return Source(model, **values)
