"""The samples of a group that a batched reward scores together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from lightning_rft.explorer.worker.stepper import settle
from lightning_rft.reward_calls import Answered
from lightning_rft.scores import Score

__all__ = ["Together"]


class Together:
    """Scores those samples of a group that have answered, as soon as no other sample of it may still answer.

    Those that are scored, or whose scoring failed, may answer again: then they wait for each other once more.

    Args:
        samples: Number of samples, each of which says once that it has :meth:`ended`.
        scores: Scores some of them, in the order of their index.
    """

    def __init__(self, samples: int, scores: Callable[[Sequence[Answered]], Awaitable[list[Score]]]) -> None:
        self._scores = scores
        self._answering = samples
        self._waiting: dict[int, tuple[Answered, asyncio.Future[Score]]] = {}
        self._call: asyncio.Task[None] | None = None
        #: When the last call began, on the clock of the event loop.
        self.began = 0.0

    async def score(self, index: int, answered: Answered) -> Score:
        """The score of a sample, or what the reward raised for all that were scored with it."""
        future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        self._waiting[index] = answered, future
        self.ended()
        return await future

    def ended(self) -> None:
        """Takes in that a sample answers no more."""
        self._answering -= 1
        if self._answering:
            return
        # in a group that is cancelled, futures are before samples end
        waiting = [entry for _, entry in sorted(self._waiting.items()) if not entry[1].done()]
        self._waiting = {}
        if waiting:
            self._answering = len(waiting)
            self.began = asyncio.get_running_loop().time()
            self._call = asyncio.create_task(self._answer(waiting))

    def stop(self) -> None:
        """Ends a call that runs, whose samples were cancelled."""
        if self._call is not None:
            self._call.cancel()

    async def _answer(self, waiting: Sequence[tuple[Answered, asyncio.Future[Score]]]) -> None:
        answers: Sequence[Score | Exception]
        try:
            answers = await self._scores([answered for answered, _ in waiting])
        except asyncio.CancelledError:
            for _, future in waiting:
                future.cancel()
            raise
        except Exception as error:  # raised in each sample
            answers = [error] * len(waiting)
        for (_, future), answer in zip(waiting, answers, strict=True):
            settle(future, answer)
