"""What samples that are still explored have sampled so far, for another explorer to go on with if theirs dies."""

from __future__ import annotations

from collections import defaultdict

from lightning_rft.experience import GroupKey
from lightning_rft.explorer.messages import Sampled
from lightning_rft.explorer.partials import Part, joined

__all__ = ["Partials"]


class Partials:
    """Keeps the tokens that explorers tell of, by group, until the group comes back or is given up."""

    def __init__(self) -> None:
        # the parts of each call, by its sample and fingerprint
        self._calls: defaultdict[GroupKey, dict[tuple[int, bytes], list[Part]]] = defaultdict(dict)

    def __contains__(self, key: GroupKey) -> bool:
        return bool(self._calls.get(key))

    def take(self, message: Sampled) -> None:
        """Adds what the samples of a group have sampled since they were heard of last."""
        calls = self._calls[message.key]
        for part in message.parts:
            if not part.start:  # the call is new, or its sample was begun again
                calls[part.sample, part.call] = []
            calls.setdefault((part.sample, part.call), []).append(part)

    def drop_older(self, key: GroupKey, version: int) -> None:
        """Forgets the calls of a group that began with older weights: nothing that follows could be trained either."""
        calls = self._calls.get(key, {})
        for call in [call for call, parts in calls.items() if parts[0].tokens.version_runs[0][0] < version]:
            del calls[call]

    def of(self, key: GroupKey) -> tuple[Part, ...]:
        """What is kept of a group, a part for each call."""
        calls = self._calls.get(key, {})
        return tuple(Part(sample, call, 0, joined(parts)) for (sample, call), parts in calls.items())

    def forget(self, key: GroupKey) -> None:
        """Forgets a group."""
        self._calls.pop(key, None)
