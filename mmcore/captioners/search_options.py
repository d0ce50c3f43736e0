"""The options of caption search: flags of a job and fields of a request."""

import math
from dataclasses import dataclass, field

from mmcore.errors import OptionError


@dataclass(frozen=True)
class SearchOptions:
    """Options of greedy and beam search."""

    num_beams: int = field(default=3, metadata={"caps": "beams"})
    """Number of beams; 1 is greedy search."""
    max_length: int = field(default=30, metadata={"caps": "words"})
    """Longest caption in words."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / length^penalty. A value below 1 prefers shorter captions."""

    def check(self) -> None:
        """Raise OptionError for an invalid value."""
        for name in ("num_beams", "max_length"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"{getattr(self, name)}: must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise OptionError("length_penalty", f"{self.length_penalty}: must be a finite number")
        if self.length_penalty != 1 and self.num_beams == 1:
            raise OptionError(
                "length_penalty", f"{self.length_penalty:g}: has no effect on greedy search; give more beams"
            )


GREEDY = SearchOptions(num_beams=1)


@dataclass(frozen=True)
class LanguageSearchOptions:
    """Options of greedy and beam search with a language model. The defaults are those of the report."""

    num_beams: int = field(default=1, metadata={"caps": "beams"})
    """Number of beams; 1 is greedy search."""
    max_length: int = field(default=30, metadata={"caps": "words"})
    """Longest caption in tokens of the language model."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / length^penalty. A value below 1 prefers shorter captions."""
    repetition_penalty: float = 1.5
    """Logits of tokens that the caption already has are divided by this if positive, else multiplied. 1 does nothing.
    Tokens of the prompt do not count."""

    def check(self) -> None:
        """Raise OptionError for an invalid value."""
        SearchOptions(self.num_beams, self.max_length, self.length_penalty).check()
        if not math.isfinite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise OptionError("repetition_penalty", f"{self.repetition_penalty:g}: must be a finite number above 0")
