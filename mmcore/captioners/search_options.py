"""The options of the search for a caption: flags of a job and fields of a request."""

import math
from dataclasses import dataclass, field

from mmcore.errors import OptionError


@dataclass(frozen=True)
class SearchOptions:
    """How the most probable caption is looked for."""

    num_beams: int = field(default=3, metadata={"caps": "beams"})
    """Beams of the search; 1 is greedy."""
    max_length: int = field(default=30, metadata={"caps": "words"})
    """Longest caption in words."""
    length_penalty: float = 1.0
    """Power of the length that a beam's log-probability is divided by: below 1 prefers shorter captions."""

    def check(self) -> None:
        """Raise OptionError for what cannot be."""
        for name in ("num_beams", "max_length"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"{getattr(self, name)}: must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise OptionError("length_penalty", f"{self.length_penalty}: must be a finite number")
        if self.length_penalty != 1 and self.num_beams == 1:
            raise OptionError(
                "length_penalty", f"{self.length_penalty:g}: greedy search has no use for it; give more beams"
            )


GREEDY = SearchOptions(num_beams=1)
