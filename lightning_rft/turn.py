"""One call of the policy as packed bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from struct import iter_unpack
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Support", "Truncation", "Turn"]

_BYTES = 4  # of every number


class Truncation(NamedTuple):
    """Truncation of the distribution that tokens are drawn from, beside the temperature; the default keeps all of it.

    Args:
        top_k: Keeps this many of the most likely tokens; 0 keeps all.
        top_p: Keeps the most likely tokens up to this total probability; 1 keeps all.
        min_p: Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class _Packed:
    """Base of values whose arrays are packed bytes, as which they pickle, compare and hash."""

    __slots__: tuple[str, ...] = ()
    _token_ids: bytes
    _logprobs: bytes

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32."""
        return _view(self._token_ids, "i4")

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """Natural-log probabilities of the tokens, float32."""
        return _view(self._logprobs, "f4")

    def packed(self) -> tuple[Any, ...]:
        """The constructor's arguments, with arrays as bytes."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.packed()

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in (slot.removeprefix("_") for slot in self.__slots__)}
        shown = (f"{name}={v.tolist() if hasattr(v, 'tolist') else v!r}" for name, v in values.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, *values: Any) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Support(_Packed):
    """The tokens that each sampled token was chosen from, itself among them, where these are not the whole vocabulary.

    Args:
        counts: Number of tokens to choose from, for each sampled token [n].
        token_ids: Ids of these tokens [sum of counts].
        logprobs: Natural-log probabilities of these tokens under the distribution that was drawn from [sum of counts].

    Raises:
        ConfigurationError: The lengths do not fit, or a number is not of its type.
    """

    _counts: bytes
    _token_ids: bytes
    _logprobs: bytes

    def __init__(self, counts: Iterable[int], token_ids: Iterable[int], logprobs: Iterable[float]) -> None:
        self._set(_pack("i", counts), _pack("i", token_ids), _pack("f", logprobs))
        if not sum(memoryview(self._counts).cast("i")) * _BYTES == len(self._token_ids) == len(self._logprobs):
            raise ConfigurationError(
                f"Support has {len(self._token_ids) // _BYTES} token_ids and {len(self._logprobs) // _BYTES} logprobs: "
                "give as many of each as `counts` sums up to"
            )

    @property
    def counts(self) -> NDArray[np.int32]:
        """Number of tokens to choose from, for each sampled token [n], int32."""
        return _view(self._counts, "i4")


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Turn(_Packed):
    """One call of the policy: what it read and what it sampled.

    Token data are packed once and travel to the buffer and the training step as these bytes: ids as int32, log-probs as
    float32. They read as NumPy arrays, read-only and without a copy. Arrays may be given as any iterable, or as the
    bytes of :meth:`packed`.

    Args:
        prompt_ids: Token ids that the policy was given.
        token_ids: Token ids that it sampled [n], the end-of-sequence token included if it was sampled.
        logprobs: Natural-log probability of each sampled token under the distribution that it was drawn from
            (temperature applied) [n].
        versions: Version of the policy that sampled each token [n]; never decreases.
        finish_reason: ``"stop"`` (end of sequence) or ``"length"`` (``max_new_tokens`` reached).
        temperature: Softmax temperature; 0 for greedy.
        sampling: Truncation of the distribution.
        parent: Index, among the sample's turns, of the one whose prompt and answer this prompt continues; None if it
            continues none.
        reward: Reward of this turn alone, if the environment gives one.
        teacher_logprobs: Natural-log probability of each sampled token under a teacher [n].
        support: The tokens that truncation, a grammar or a ban left to choose from, the sampled one among them.

    Raises:
        ConfigurationError: The lengths do not fit, or a number is not of its type.

    Example:
        >>> turn = Turn((1, 2), token_ids=(3, 4), logprobs=(-0.5, -0.25), versions=(0, 0), finish_reason="stop")
        >>> turn.token_ids.tolist(), float(turn.logprobs.mean())
        ([3, 4], -0.375)
    """

    _prompt_ids: bytes
    _token_ids: bytes
    _logprobs: bytes
    _versions: bytes  # (version, length) of each stretch of equal versions
    finish_reason: str
    temperature: float
    sampling: Truncation
    parent: int | None
    reward: float | None
    _teacher_logprobs: bytes | None
    support: Support | None

    def __init__(
        self,
        prompt_ids: Iterable[int],
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        versions: Iterable[int],
        finish_reason: str,
        temperature: float = 1.0,
        sampling: Truncation = Truncation(),  # noqa: B008 (immutable)
        parent: int | None = None,
        reward: float | None = None,
        teacher_logprobs: Iterable[float] | None = None,
        support: Support | None = None,
    ) -> None:
        runs = versions if isinstance(versions, bytes) else _pack("i", chain.from_iterable(_runs(versions)))
        teacher = None if teacher_logprobs is None else _pack("f", teacher_logprobs)
        arrays = _pack("i", prompt_ids), _pack("i", token_ids), _pack("f", logprobs), runs
        reward = None if reward is None else float(reward)
        self._set(*arrays, finish_reason, float(temperature), sampling, parent, reward, teacher, support)
        lengths = {"logprobs": len(self._logprobs) // _BYTES, "versions": sum(count for _, count in self.version_runs)}
        if teacher is not None:
            lengths["teacher_logprobs"] = len(teacher) // _BYTES
        if support is not None:
            lengths["support"] = len(support._counts) // _BYTES
        if set(lengths.values()) != {self.num_tokens}:
            raise ConfigurationError(f"Turn has {self.num_tokens} token_ids but {lengths}: give one of each per token")

    def placed(self, parent: int | None, reward: float | None) -> Turn:
        """The same turn with another parent and reward."""
        values = list(self.packed())
        values[7:9] = parent, reward
        return type(self)(*values)

    def extends(self, earlier: Turn) -> bool:
        """Whether the prompt begins with an earlier turn's prompt and answer, token for token."""
        prompt = earlier._prompt_ids
        return self._prompt_ids.startswith(prompt) and self._prompt_ids.startswith(earlier._token_ids, len(prompt))

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        """Token ids that the policy was given, int32."""
        return _view(self._prompt_ids, "i4")

    @property
    def teacher_logprobs(self) -> NDArray[np.float32] | None:
        """The teacher's log-probs of the sampled tokens [n], float32."""
        return None if self._teacher_logprobs is None else _view(self._teacher_logprobs, "f4")

    @property
    def versions(self) -> NDArray[np.int32]:
        """Version that sampled each token [n], int32; a copy."""
        runs = _view(self._versions, "i4")
        return runs[::2].repeat(runs[1::2])

    @property
    def version_runs(self) -> list[tuple[int, int]]:
        """The versions as (version, length) of each stretch of equal ones."""
        return list(iter_unpack("ii", self._versions))

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, n."""
        return len(self._token_ids) // _BYTES

    @property
    def num_free(self) -> int:
        """Sampled tokens that others might have taken the place of; one that a grammar forced has no gradient."""
        return self.num_tokens if self.support is None else int((self.support.counts > 1).sum())


def _pack(kind: str, values: Iterable[float]) -> bytes:
    """The bytes of an array of int32 (``i``) or float32 (``f``), which may be bytes already."""
    if isinstance(values, bytes):
        return values
    try:
        return array(kind, values).tobytes()
    except (TypeError, OverflowError) as error:
        raise ConfigurationError(f"a turn takes ids and versions as int32, log-probs as float32: {error}") from error


def _view(data: bytes, dtype: str) -> NDArray[Any]:
    from numpy import frombuffer  # here, as an explorer starts sooner without

    return frombuffer(data, dtype)


def _runs(versions: Iterable[int]) -> Iterator[tuple[int, int]]:
    for version, run in groupby(versions):
        yield version, sum(1 for _ in run)
