"""Which GPUs trainer and explorers get: a plan that can be printed, or the arithmetic of why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Literal

from lightning_rft.errors import ConfigurationError

__all__ = ["Placement", "Sharing", "place"]

Sharing = Literal["auto", "separate", "shared"]

_MIG = "MIG-"


@dataclass(frozen=True)
class Placement:
    """GPUs of the trainer and of each explorer, named as in ``CUDA_VISIBLE_DEVICES``; without explorers', all on CPUs.

    Example:
        >>> print(Placement(("0", "1"), (("2",), ("3",))))
        trainer: GPUs 0-1; explorers: 2, 3
    """

    trainer: tuple[str, ...] = ()
    explorers: tuple[tuple[str, ...], ...] = ()

    @property
    def devices(self) -> list[str] | None:
        """``CUDA_VISIBLE_DEVICES`` of each explorer."""
        return [",".join(gpus) for gpus in self.explorers] or None

    @property
    def tenants(self) -> int:
        """Maximum number of processes on one GPU."""
        return max(Counter(chain(self.trainer, *self.explorers)).values(), default=1)

    @property
    def beside_trainer(self) -> int:
        """Maximum number of explorers on a GPU of the trainer's."""
        return max((sum(name in gpus for gpus in self.explorers) for name in self.trainer), default=0)

    @property
    def nccl(self) -> bool:
        """Whether NCCL can connect trainer and explorers: it refuses two processes on one GPU, also on parts of it."""
        names = [*self.trainer, *chain(*self.explorers)]
        own = self.tenants == 1 and not any(name.startswith(_MIG) for name in names)
        return bool(self.trainer and self.explorers) and own

    @property
    def apart(self) -> str:
        """Why the explorers are not on the trainer's GPUs, all of them; empty if they are."""
        explorers = set(chain(*self.explorers))
        if not self.trainer or not explorers:
            return f"not both sides are on GPUs ({self})"
        if any(name.startswith(_MIG) for name in self.trainer):
            return "what they share are parts of a GPU (MIG)"
        return "" if explorers <= set(self.trainer) else f"some have others ({self})"

    def described(self, share: float | None) -> str:
        """The plan, and what follows from sharing; ``share`` is that of a GPU's memory which an engine takes."""
        if self.tenants == 1:
            return str(self)
        memory = "" if share is None else f", and each engine takes {share:.2g} of its GPU's memory"
        turns = "explorers sleep while the trainer trains, " if self.beside_trainer else ""
        way = "Gloo" if self.apart else "CUDA IPC"
        weights = f"weights go by {way} or checkpoint, since NCCL refuses two processes on a GPU"
        return f"{self} (shared: {turns}{weights}{memory})"

    def __str__(self) -> str:
        trainer = "CPU"
        if self.trainer:
            trainer = f"GPU{'s' * (len(self.trainer) > 1)} {_listed(self.trainer)}"
        return f"trainer: {trainer}; explorers: {', '.join(map(_listed, self.explorers)) or 'CPU'}"


def place(
    visible: Sequence[str],
    trainer: Sequence[int],
    explorers: int,
    each: int,
    sharing: Sharing = "auto",
    devices: Sequence[str] | None = None,
) -> Placement:
    """Plans who gets which GPU.

    ``visible`` are the names of this process's GPUs, ``trainer`` the indices among them that the trainer uses, ``each``
    is the number of GPUs that an explorer takes, and ``devices`` is what the user chose for them. ``"auto"`` shares a
    GPU only where there is one alone and one explorer for it.

    Raises:
        ConfigurationError: There are too few GPUs, or ``devices`` are the trainer's or too few for an explorer.

    Example:
        >>> print(place(["0", "1", "2", "3"], trainer=[0, 1], explorers=2, each=1))
        trainer: GPUs 0-1; explorers: 2, 3
        >>> place(["0", "1"], trainer=[0, 1], explorers=1, each=1)
        Traceback (most recent call last):
        ...
        lightning_rft.errors.ConfigurationError: 1 explorer x 1 GPU makes 1 GPU, but the trainer has 2 of 2 GPUs and \
leaves 0 (devices="auto" takes all): set Trainer(devices=1), or ExplorerPool(placement="shared")
    """
    used = tuple(visible[index] for index in trainer)
    if devices is not None:
        return _chosen(used, devices, each, sharing)
    if not visible or not each:
        return Placement(used)
    mig = visible[0].startswith(_MIG)
    if mig and each > 1:
        raise ConfigurationError(f"an explorer of {each} GPUs cannot run on parts of a GPU (MIG): set its size to 1")
    free = [name for name in visible if name not in used]
    alone = len(visible) == explorers == each == 1
    if used and (sharing == "shared" or (sharing == "auto" and alone and not free)):
        if each > len(used):
            raise ConfigurationError(
                f"an explorer of {each} GPUs cannot share the trainer's, which are {len(used)}: set Trainer(devices="
                f"{each}), or make the engine smaller"
            )
        turns = islice(cycle(used), explorers * each)
        return Placement(used, tuple(tuple(islice(turns, each)) for _ in range(explorers)))
    if len(free) < explorers * each:
        raise ConfigurationError(_arithmetic(len(visible), len(used), explorers, each))
    return Placement(used, tuple(tuple(free[i * each : (i + 1) * each]) for i in range(explorers)))


def _chosen(used: tuple[str, ...], devices: Sequence[str], each: int, sharing: Sharing) -> Placement:
    """The placement that the user has chosen, checked as far as names tell."""
    explorers = tuple(tuple(name.strip() for name in entry.split(",")) for entry in devices)
    if not each:  # an engine that uses none: whatever its environment is to say
        return Placement(used, explorers)
    for entry, gpus in zip(devices, explorers, strict=True):
        if len(gpus) != each:
            raise ConfigurationError(
                f"ExplorerPool(devices={list(devices)}): {entry!r} names {_count(len(gpus), 'GPU')}, but each explorer "
                f"takes {each}"
            )
    if used and len({name.isdigit() for name in (*used, *chain(*explorers))}) > 1:
        raise ConfigurationError(
            f"ExplorerPool(devices={list(devices)}) and the trainer's GPUs ({', '.join(used)}) are named in two ways, "
            "by index and by UUID: name them as CUDA_VISIBLE_DEVICES does"
        )
    if sharing != "shared":
        taken = [name for gpus in explorers for name in gpus]
        if both := [name for name in taken if _is_one_of(name, used)]:
            raise ConfigurationError(
                f"ExplorerPool(devices={list(devices)}) and the trainer ({_listed(used)}) both have GPU "
                f"{_listed(both)}: choose others, lower Trainer(devices=...), or set placement='shared'"
            )
        if several := sorted({name for name in taken if taken.count(name) > 1}):
            raise ConfigurationError(
                f"ExplorerPool(devices={list(devices)}): several explorers have GPU {_listed(several)}: give each "
                "GPUs of its own, or set placement='shared'"
            )
    # the trainer's name for a GPU that both have
    same = {name: other for name in chain(*explorers) for other in used if _is_one_of(name, [other])}
    return Placement(used, tuple(tuple(same.get(name, name) for name in gpus) for gpus in explorers))


def _is_one_of(name: str, used: Iterable[str]) -> bool:
    """Whether two names are of one GPU: the beginning of a UUID names it, too."""
    if name.isdigit():
        return name in used
    return any(name.startswith(other) or other.startswith(name) for other in used)


def _arithmetic(visible: int, used: int, explorers: int, each: int) -> str:
    """Why explorers do not fit, and what to set."""
    needed, left = explorers * each, visible - used
    ways = []
    if used and needed < visible:
        ways.append(f"set Trainer(devices={visible - needed})")
    fewer = (left or visible - 1) // each
    if not ways and 0 < fewer < explorers:
        ways.append(f"set explorers={fewer}" + ("" if left else f" and Trainer(devices={visible - fewer * each})"))
    if used >= each:
        ways.append('ExplorerPool(placement="shared")')
    there = f"the trainer has {used} of {_count(visible, 'GPU')} and leaves {left}" if used else f"there are {visible}"
    return (
        f"{_count(explorers, 'explorer')} x {_count(each, 'GPU')} makes {_count(needed, 'GPU')}, but {there}"
        + (' (devices="auto" takes all)' if used and not left else "")
        + ": "
        + (", or ".join(ways) or "use fewer explorers, or smaller ones")
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _listed(names: Sequence[str]) -> str:
    """Names in order, neighbours as a range.

    Example:
        >>> _listed(["0", "1", "2", "5", "GPU-8932f937"])
        '0-2, 5, GPU-8932f937'
    """
    runs: list[list[str]] = []
    for name in names:
        if runs and name.isdigit() and runs[-1][-1].isdigit() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
