"""Typed errors. Each message names the setting and says what to do."""

__all__ = [
    "ConfigurationError",
    "DeadlineError",
    "ExplorerError",
    "RFTError",
    "ScheduleError",
    "TransportError",
]


class RFTError(Exception):
    """Base class of every error that lightning_rft raises on its own account."""


class ConfigurationError(RFTError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before any process starts if possible."""


class ScheduleError(RFTError, RuntimeError):
    """Order, version or staleness is not what the strategy promises: training on would be silently wrong."""


class ExplorerError(RFTError, RuntimeError):
    """An explorer process died or failed; the message carries its traceback and the last lines of its log."""


class TransportError(RFTError, RuntimeError):
    """Weights did not reach an engine whole."""


class DeadlineError(RFTError, TimeoutError):
    """A wait passed its deadline; the message says what was waited for and which setting bounds it."""
