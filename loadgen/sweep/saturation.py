"""The highest load a cluster bears: asked, doubled until it is too much, then by bisection. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_HALVINGS_MOST = 8
"""Below the first load: what does not bear 1/256 of it is not looked at more closely."""


@dataclass(slots=True)
class Saturation:
    """Says which load to try next, is told what came of it, and ends by itself.

    first -> x 2 -> x 2 ... until too much          |  too much at once: halved until borne
    then between the highest borne and the lowest that was not, until they are `precision` apart
    """

    first: float
    precision: float = 0.05
    """The two may differ by this share of the borne one; of a number of users by 1 in any case."""
    is_whole: bool = False
    tries_most: int = 24
    borne: float | None = None
    """The highest load that was borne."""
    refused: float | None = None
    """The lowest that was not."""
    tries: int = 0

    def next(self) -> float | None:
        """The load to try; None where it is known well enough."""
        if self.tries >= self.tries_most:
            return None
        if self.borne is None:
            return self._halved()
        if self.refused is None:
            return 2 * self.borne
        if self.refused - self.borne <= max(self.precision * self.borne, 1.0 if self.is_whole else 0.0):
            return None
        middle = (self.borne + self.refused) / 2
        return float(int(middle)) if self.is_whole else middle

    def told(self, load: float, *, is_borne: bool) -> None:
        """What came of a load."""
        self.tries += 1
        if is_borne:
            self.borne = load
        else:
            self.refused = load

    def _halved(self) -> float | None:
        if self.refused is None:
            return self.first
        half = self.refused / 2
        if self.is_whole:
            half = float(int(half))
        return half if half >= self.first / 2**_HALVINGS_MOST and half > 0 else None
