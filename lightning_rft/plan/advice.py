"""The sentence that a plan ends with."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rft.plan.figures import Figures
from lightning_rft.plan.planner import Row
from lightning_rft.sync.synchronous import Synchronous

__all__ = ["recommendation", "recommended"]

_AS_FAST = 0.05  # of two strategies that differ by less, the one that trains fresher experience


def recommended(rows: Sequence[Row], threshold: float) -> Row:
    """The least stale of the fastest, or the strictly on-policy one where nothing saves that share of a step."""
    on_policy, fastest = _on_policy(rows), min(row.step_s for row in rows)
    if fastest > (1 - threshold) * on_policy.step_s:
        return on_policy
    as_fast = [row for row in rows if row.step_s <= (1 + _AS_FAST) * fastest]
    return min(as_fast, key=lambda row: (row.staleness_max, row.staleness_mean, row.step_s))


def recommendation(figures: Figures, rows: Sequence[Row], threshold: float = 0.1) -> str:
    """One sentence about rows of the same number of explorers: what to use, and why."""
    on_policy, best = _on_policy(rows), recommended(rows, threshold)
    explore_s = max(0.0, on_policy.step_s - figures.train_s - figures.push_s)
    parts = f"exploring takes {explore_s:.2f} s, training {figures.train_s:.2f} s and a push {figures.push_s:.2f} s"
    if best is on_policy:
        fastest = min(rows, key=lambda row: row.step_s)
        saved = 1 - fastest.step_s / on_policy.step_s
        return (
            f"Nothing is recommended over {on_policy.case.name}, {on_policy.step_s:.2f} s a step: {parts}, so that the "
            f"fastest, {fastest.case.name}, would save {saved:.0%}, and the threshold is {threshold:.0%}."
        )
    saved = 1 - best.step_s / on_policy.step_s
    return (
        f"Use {best.case.name}: {best.step_s:.2f} s a step instead of {on_policy.step_s:.2f} s, {saved:.0%} less, "
        f"since {parts}, which it overlaps; nothing as fast is less stale."
    )


def _on_policy(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if isinstance(row.case.rule, Synchronous) and row.case.rule.sync_interval == 1)
