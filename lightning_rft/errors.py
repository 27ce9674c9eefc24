"""Typed errors. Each message names the setting and says what to do."""

__all__ = [
    "ConfigurationError",
    "DeadlineError",
    "ExplorerError",
    "LinkError",
    "RFTError",
    "RankError",
    "ScheduleError",
    "StorageError",
    "TransportError",
]


class RFTError(Exception):
    """Base class of every error that lightning_rft raises on its own account."""


class ConfigurationError(RFTError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before any process starts if possible."""


class ScheduleError(RFTError, RuntimeError):
    """Order, version or staleness is not what the strategy promises: training on would be silently wrong."""


class StorageError(RFTError, OSError):
    """The buffer's file cannot be read or written: a full disk, or a file that something has damaged."""


class ExplorerError(RFTError, RuntimeError):
    """An explorer process died or failed; the message carries its traceback and the last lines of its log."""


class RankError(RFTError, RuntimeError):
    """Another of the trainer's ranks died or failed; the message carries its traceback, if it had one to tell."""


class TransportError(RFTError, RuntimeError):
    """Weights did not reach an engine whole."""


class LinkError(TransportError):
    """A weight transport broke off because one of its members is gone; those that are left can try again."""


class DeadlineError(RFTError, TimeoutError):
    """A wait passed its deadline; the message says what was waited for and which setting bounds it."""
