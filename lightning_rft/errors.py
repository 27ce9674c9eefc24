"""Typed errors, whose messages name the setting and say what to do."""

__all__ = [
    "AgreementError",
    "AuthenticationError",
    "ConfigurationError",
    "ContextFull",
    "DeadlineError",
    "ExplorerError",
    "LinkError",
    "NonFiniteError",
    "RFTError",
    "RankError",
    "ScheduleError",
    "StorageError",
    "TransportError",
]


class RFTError(Exception):
    """Base class of lightning_rft's own errors."""


class ConfigurationError(RFTError, ValueError):
    """A setting, or a combination of settings, cannot work; raised before any process starts if possible."""


class AuthenticationError(ConfigurationError):
    """The other end of a connection does not know this run's secret, or does not take ours."""


class ContextFull(ConfigurationError):
    """The prompt of a call and ``max_new_tokens`` do not fit the engine's context; a workflow may go on without it."""


class ScheduleError(RFTError, RuntimeError):
    """Order, version or staleness breaks the strategy's promise; training on would be silently wrong."""


class NonFiniteError(RFTError, ArithmeticError):
    """Loss or gradient was not finite in several batches in a row; the weights are those before the first of them."""


class StorageError(RFTError, OSError):
    """The buffer's file cannot be read or written, because the disk is full or the file damaged."""


class ExplorerError(RFTError, RuntimeError):
    """An explorer process died or failed; the message carries its traceback and the last lines of its log."""


class RankError(RFTError, RuntimeError):
    """Another rank of the trainer died or failed; the message carries its traceback, if it sent one."""


class TransportError(RFTError, RuntimeError):
    """Weights did not reach an engine completely."""


class AgreementError(RFTError, RuntimeError):
    """Explorers and trainer compute different log-probs with what should be the same weights."""


class LinkError(TransportError):
    """A weight transport broke off because a member is gone; the others can try again."""


class DeadlineError(RFTError, TimeoutError):
    """A wait exceeded its deadline; the message names what was waited for and the setting that bounds it."""
