"""Public test helpers, for this package, for strategies and engines that others write, and for user code."""

from lightning_rft.simulation.driver import drive
from lightning_rft.simulation.events import Crash, Event
from lightning_rft.testing.conformance import check_events, check_strategy
from lightning_rft.testing.model import tiny_model

__all__ = ["Crash", "Event", "check_events", "check_strategy", "drive", "tiny_model"]
