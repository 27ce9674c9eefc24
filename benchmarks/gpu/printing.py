"""The table, line by line, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.measurement import Outcome

__all__ = ["as_json", "head", "line", "summary"]

Results = Mapping[str, Sequence[Outcome]]  # by section


def head(machine: Machine) -> str:
    """What is measured."""
    cards = [f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in machine.gpus] or ["no GPU, so the CPU"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return f"{', '.join(cards)}; {machine.precision}; {machine.model}\n{versions}\n"


def line(section: str, outcome: Outcome) -> str:
    """One row.

    Example:
        >>> line("transports", Outcome("Gloo", {"push_s": 0.02345}))
        'transports   Gloo                                     push_s 0.0234'
    """
    if outcome.failed:
        said = f"FAILED: {outcome.failed}"
    elif outcome.skipped:
        said = f"skipped: {outcome.skipped}"
    else:
        said = ", ".join(f"{name} {_short(value)}" for name, value in outcome.figures.items())
    return f"{section:12} {outcome.what:40} {said}"


def _short(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(results: Results) -> str:
    """How much was measured, skipped and failed."""
    found = [outcome for outcomes in results.values() for outcome in outcomes]
    failed = sum(bool(outcome.failed) for outcome in found)
    skipped = sum(bool(outcome.skipped) for outcome in found)
    return f"{len(found) - failed - skipped} measured, {skipped} skipped, {failed} failed"


def as_json(machine: Machine, results: Results) -> dict[str, Any]:
    """Everything that was found, and on what."""
    sections = {
        section: {outcome.what: _entry(outcome) for outcome in outcomes} for section, outcomes in results.items()
    }
    return {
        "gpus": [vars(gpu) for gpu in machine.gpus],
        "precision": machine.precision,
        "versions": machine.versions,
        "model": machine.model,
        "work": vars(machine.work),
        "sections": sections,
    }


def _entry(outcome: Outcome) -> dict[str, Any]:
    if outcome.failed:
        return {"failed": outcome.failed}
    return {"skipped": outcome.skipped} if outcome.skipped else dict(outcome.figures)
