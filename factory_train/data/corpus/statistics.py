"""What there is to know about a corpus that has been prepared."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from factory_train.units import format_bytes, format_count

_WIDTH = 32


@dataclass
class Statistics:
    """Counts over a corpus.

    Args:
        documents: that became tokens, of both splits.
        tokens: of both splits, end-of-text included.
        num_bytes: of their text in UTF-8.
        empty: documents of nothing but white space, left out.
        skipped: malformed documents that were left out, by reason.
        examples: where some of the malformed ones are.
        lengths: of training documents in tokens, end-of-text included: how many have 2^k to 2^(k+1) - 1, by k.
        longest: tokens of the longest training document.
    """

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    empty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    longest: int = 0

    def add_lengths(self, lengths_D: npt.NDArray[np.int64]) -> None:
        """Counts the lengths of training documents (D,)."""
        positive = lengths_D[lengths_D > 0]
        if len(positive):
            # Exact below 2^53: frexp takes the exponent out of the number.
            self.lengths.update(Counter((np.frexp(positive.astype(np.float64))[1] - 1).tolist()))
            self.longest = max(self.longest, int(positive.max()))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["skipped"] = dict(sorted(self.skipped.items()))
        values["lengths"] = {str(exponent): self.lengths[exponent] for exponent in sorted(self.lengths)}
        return values

    @staticmethod
    def from_json(value: dict[str, Any]) -> Statistics:
        lengths = Counter({int(exponent): count for exponent, count in value["lengths"].items()})
        return Statistics(**{**value, "skipped": Counter(value["skipped"]), "lengths": lengths})

    def lines(self) -> list[str]:
        """Returns what a person should see."""
        ratio = self.num_bytes / max(1, self.tokens)
        lines = [
            f"documents  {self.documents:,} ({format_bytes(self.num_bytes)} of text)",
            f"tokens     {self.tokens:,}, {ratio:.2f} bytes each",
        ]
        if self.empty:
            lines.append(f"empty      {self.empty:,} documents left out")
        for reason, count in self.skipped.most_common():
            lines.append(f"skipped    {count:,} {reason}")
        lines += [f"           {example}" for example in self.examples]
        if self.lengths:
            lines.append("length of training documents, in tokens")
            most = max(self.lengths.values())
            for exponent in range(min(self.lengths), max(self.lengths) + 1):
                count = self.lengths[exponent]
                bounds = f"{format_count(2**exponent)} to {format_count(2 ** (exponent + 1) - 1)}"
                lines.append(f"  {bounds:>16}  {'#' * round(count / most * _WIDTH):<{_WIDTH}}  {count:,}")
        return lines
