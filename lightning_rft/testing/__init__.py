"""Public helpers for tests: of this package, of strategies and engines that others write, and of user code."""

from lightning_rft.testing.conformance import check_events, check_strategy
from lightning_rft.testing.driver import Crash, Event, drive
from lightning_rft.testing.model import tiny_model

__all__ = ["Crash", "Event", "check_events", "check_strategy", "drive", "tiny_model"]
