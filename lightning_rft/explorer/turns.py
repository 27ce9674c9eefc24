"""Turns on shared GPUs: a pure state machine that has explorers sleep while the trainer trains.

Events go in as method calls, and messages to explorers come out. It knows no clock, process or tensor.

    explorers' turn:  all awake    ── trainer(level) ──►  told to sleep ── each has answered ──►  trainer's turn
    trainer's turn:   all asleep   ── explorers(parts) ─►  told to wake  ── each has answered ──►  explorers' turn

An explorer that comes up in the trainer's turn is told to sleep at once. Explorers whose weights alone are awake are to
load, after which they wake the rest by themselves.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning_rft.errors import ScheduleError
from lightning_rft.explorer.engines.sleeping import DROPS, PARTS
from lightning_rft.explorer.messages import Sleep, Slept, Wake, Woken

__all__ = ["Told", "Turns"]

Told = list[tuple[int, Sleep | Wake]]  #: Messages, each with its explorer.


class Turns:
    """Tracks which explorers sleep, and whose turn it is. Not thread-safe.

    Example:
        >>> turns = Turns()
        >>> turns.joined(0)
        []
        >>> turns.trainer(level=2)
        [(0, Sleep(level=2))]
        >>> turns.asleep([0]), turns.answered(0, Slept()), turns.asleep([0])
        (False, None, True)
        >>> turns.explorers(("weights",))
        [(0, Wake(parts=('weights',)))]
    """

    def __init__(self) -> None:
        #: Whether it is the trainer's turn, or about to be; before the first turn, ``None``: both sides hold memory.
        self.trains: bool | None = None
        self._awake: dict[int, set[str]] = {}  # by explorer, what of its memory it holds
        self._told: set[int] = set()  # those that have yet to answer

    # Events

    def joined(self, explorer: int) -> Told:
        """An explorer is up, and awake; its weights are none that any push has brought."""
        self._awake[explorer] = set(PARTS)
        return self._sleep([explorer], DROPS) if self.trains else []

    def died(self, explorer: int) -> None:
        """An explorer is gone."""
        self._awake.pop(explorer, None)
        self._told.discard(explorer)

    def answered(self, explorer: int, message: Slept | Woken) -> None:
        """An explorer has done what it was told."""
        if explorer in self._awake:
            self._told.discard(explorer)
            if isinstance(message, Slept):
                self._awake[explorer].clear()
            else:
                self._awake[explorer].update(message.parts)

    def loaded(self, explorer: int) -> None:
        """An explorer has loaded weights, and woken what still slept of it."""
        self._awake[explorer].update(PARTS)

    def trainer(self, level: int) -> Told:
        """The trainer is to have its turn, as soon as every explorer sleeps."""
        self._settled()
        self.trains = True
        return self._sleep([explorer for explorer, awake in self._awake.items() if awake], level)

    def explorers(self, parts: Collection[str] = PARTS) -> Told:
        """The trainer has given its memory back, and explorers are to wake, or some parts of them."""
        self._settled()
        self.trains = False
        told: Told = []
        for explorer, awake in self._awake.items():
            if asleep := tuple(part for part in parts if part not in awake):
                told.append((explorer, Wake(asleep)))
                self._told.add(explorer)
        return told

    # Answers

    @property
    def late(self) -> list[int]:
        """Explorers that have yet to answer."""
        return sorted(self._told)

    def asleep(self, explorers: Collection[int]) -> bool:
        """Whether all of these explorers sleep, so that the trainer may train; one that is not known does not."""
        return not self._told and not any(self._awake.get(explorer, PARTS) for explorer in explorers)

    def _sleep(self, explorers: Collection[int], level: int) -> Told:
        self._told.update(explorers)
        return [(explorer, Sleep(level)) for explorer in explorers]

    def _settled(self) -> None:
        if self._told:
            raise ScheduleError(f"the GPUs change hands while explorers {self.late} have yet to sleep or wake")
