"""What sections are made of: named measurements, and what came of each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_rft.errors import ConfigurationError

__all__ = ["Figures", "Measurement", "Outcome", "Refuted", "Skipped", "skipped"]

Figures = Mapping[str, float | str | bool]


class Skipped(Exception):
    """Why something is not measured on this machine."""


class Refuted(Exception):
    """A figure that contradicts what the package promises."""


@dataclass(frozen=True)
class Outcome:
    """Figures, or why there are none."""

    what: str
    figures: Figures = field(default_factory=dict)
    skipped: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Measurement:
    """One row of the table; ``measure`` returns its figures, or raises :class:`Skipped`."""

    what: str
    measure: Callable[[], Figures]

    def outcome(self) -> Outcome:
        """Measures. Settings that the package refuses on this machine are skipped, with the reason that it gives."""
        try:
            return Outcome(self.what, self.measure())
        except (Skipped, ConfigurationError) as reason:
            return Outcome(self.what, skipped=str(reason))
        except Exception as error:  # a row like any other: it fails the command, and those after it are measured too
            traceback.print_exc()
            return Outcome(self.what, failed=f"{type(error).__name__}: {error}")


def skipped(what: str, reason: str) -> Measurement:
    """A row that only says why there are no figures."""

    def measure() -> Figures:
        raise Skipped(reason)

    return Measurement(what, measure)
