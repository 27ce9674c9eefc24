"""What a run's logger wrote: the curve of every metric, from a CSV file or TensorBoard's event files."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_rft.monitor.activity import advice

__all__ = ["Curve", "read_logged", "shares", "verdict"]

Curve = list[tuple[int, float]]  # step and value

_EVENTS = "events.out.tfevents.*"
_NO_METRICS = {"epoch", "step", "hp_metric"}
# by side: metric -> what the time went to
_WAITS = {
    "trainer": {"rft/wait_experience_s": "waiting for experience", "rft/wait_push_s": "waiting before a push"}
    | {"rft/sync_s": "pushing weights"},
    "explorers": {"rft/explorer_explore_s": "exploring", "rft/explorer_wait_weights_s": "waiting for weights"}
    | {"rft/explorer_wait_room_s": "waiting for room", "rft/explorer_load_s": "loading weights"},
}


def read_logged(run: Path) -> tuple[dict[str, Curve], str]:
    """The curves of a run's folder by metric, and which file they are from or why there are none."""
    if (run / "metrics.csv").is_file():
        return _from_csv(run / "metrics.csv"), "metrics.csv"
    if not any(run.glob(_EVENTS)):
        return {}, "no CSVLogger or TensorBoardLogger wrote metrics here"
    if importlib.util.find_spec("tensorboard") is None:
        return {}, "TensorBoard's files cannot be read: pip install tensorboard"
    return _from_events(run), "TensorBoard's files"


def shares(curves: Mapping[str, Curve]) -> dict[str, dict[str, float]]:
    """What share of its time each side spent on what, of the steps that were logged; empty if none was.

    Explorers are always in one of their states, which therefore add up to the time that passed. What is left of it on
    the trainer's side is training itself, and validation and checkpoints.
    """
    seconds = {
        side: {name: _total(curves.get(metric, [])) for metric, name in names.items()} for side, names in _WAITS.items()
    }
    passed = sum(seconds["explorers"].values())
    if not passed:
        return {}
    waited = sum(seconds["trainer"].values())
    seconds["trainer"] = {"training and the rest": max(0.0, passed - waited)} | seconds["trainer"]
    return {
        side: {name: value / sum(parts.values()) for name, value in parts.items()} for side, parts in seconds.items()
    }


def verdict(of: Mapping[str, Mapping[str, float]]) -> str:
    """What to change, given the :func:`shares`."""
    trainer, explorers = of["trainer"], of["explorers"]
    return advice(
        experience=trainer["waiting for experience"],
        push=trainer["waiting before a push"],
        weights=explorers["waiting for weights"],
        room=explorers["waiting for room"],
        load=explorers["loading weights"],
    )


def _from_csv(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if name not in _NO_METRICS and step is not None and value is not None:
                    curves[name].append((int(step), value))
    return curves


def _from_events(run: Path) -> dict[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name) if math.isfinite(event.value)]
        for name in events.Tags()["scalars"]
        if name not in _NO_METRICS
    }


def _number(text: object) -> float | None:
    """The finite number that a cell holds; the last row of a file that is being written may be cut."""
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _total(curve: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in curve)
