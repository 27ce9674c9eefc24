"""All that is known of a run, as plain values for its page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_rft.buffer.reader import read_pruned
from lightning_rft.errors import ConfigurationError
from lightning_rft.model_folder import Pretrained
from lightning_rft.monitor.drawing import KINDS
from lightning_rft.monitor.layout import Block, last_batches
from lightning_rft.monitor.trace import spans_of
from lightning_rft.report.logged import Curve, read_logged, shares, verdict
from lightning_rft.report.stored import Stored, add_prompts

__all__ = ["gathered"]

_MOST_SAMPLES = 2000
_MOST_POINTS = 1000  # of a curve
_BATCHES = 12  # in the timeline
_FIRST = (  # curves that are always shown; the others can be unfolded
    *("rft/reward", "val/reward", "val/pass_at_1", "rft/entropy", "rft/sampling_entropy", "rft/kl", "rft/grad_norm"),
    *("rft/completion_length", "rft/truncated_share", "rft/groups_without_signal", "rft/staleness_max"),
    "rft/tokens_per_second",
)


def gathered(folder: Path, buffer: Path | None) -> dict[str, Any]:
    """What the page shows; a part that is not there is empty, and a note says why."""
    notes = []
    logged, source = read_logged(folder)
    if not logged:
        notes.append(f"Curves are those of the buffer alone: {source}.")
    path = buffer or folder / "rft" / "buffer.sqlite"
    there = buffer is not None or path.is_file()
    stored = Stored.read(path, _MOST_SAMPLES) if there else Stored([], _MOST_SAMPLES)
    if not there:
        notes.append("No buffer: it was kept in memory, or elsewhere (give its path with --buffer), or is not begun.")
    pruned = read_pruned(path) if there else []
    notes += [
        f"Run {run}: {groups:,} groups with {samples:,} samples, of batches before {before:,}, are neither counted nor "
        "shown: Buffer(keep=...) had them deleted."
        for run, before, groups, samples in pruned
    ]
    samples, prompts = stored.samples, list[str]()
    if samples:
        tokenizer = _tokenizer(folder)
        if tokenizer is None:
            notes.append("Prompts are not shown: hparams.yaml names no model whose tokenizer is on this machine.")
        else:
            prompts = add_prompts(samples, path, tokenizer)
    timeline, problem = _timeline(folder / "rft" / "timeline.json")
    notes += [problem] if problem else []
    waits = shares(logged)
    return {
        "run": "/".join(folder.absolute().parts[-2:]),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "notes": notes,
        "states": dict(stored.states),
        "totals": {"samples": stored.total_samples, "tokens": stored.total_tokens},
        "curves": _curves(stored.curves(), logged, whole=not pruned),
        "waits": waits,
        "advice": verdict(waits) if waits else "",
        "timeline": timeline,
        "samples": samples,
        "prompts": prompts,
        "failures": stored.failures,
    }


def _curves(
    stored: Mapping[str, Mapping[int, Curve]], logged: Mapping[str, Curve], *, whole: bool
) -> list[dict[str, Any]]:
    """Curves in the order in which they are shown; a ``whole`` buffer knows every batch, a logger only some."""
    of_logger = {name: [curve] for name, curve in logged.items() if curve}
    of_buffer = {name: list(runs.values()) for name, runs in stored.items()}
    lines = of_logger | of_buffer if whole else of_buffer | of_logger
    order = {name: place for place, name in enumerate(_FIRST)}
    return [
        {"name": name, "first": name in order, "lines": [_thinned(line) for line in lines[name]]}
        for name in sorted(lines, key=lambda name: (order.get(name, len(order)), name))
    ]


def _thinned(curve: Curve) -> Curve:
    """The curve, as means over as many neighbouring points as it takes to have few enough."""
    size = -(-len(curve) // _MOST_POINTS)
    pieces = [curve[begin : begin + size] for begin in range(0, len(curve), size)] if size > 1 else []
    return [(piece[-1][0], fmean(value for _, value in piece)) for piece in pieces] or curve


def _timeline(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The last batches of a trace as blocks in seconds since its beginning, or why there are none."""
    if not path.is_file():
        return None, ""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        spans = spans_of(trace)
    except (ValueError, KeyError, TypeError):
        return None, "timeline.json cannot be read: it is cut short, or not one of TimelineCallback."
    if not spans:
        return None, ""
    rows, (begin, end), note = last_batches(spans, _BATCHES)
    return {
        "title": str(trace.get("otherData", {}).get("strategy", "")),
        "note": note,
        "begin": begin,
        "end": end,
        "tracks": [{"name": track, "blocks": list(_blocks(blocks))} for track, blocks in rows.items()],
        "kinds": {kind: look[:3] for kind, look in KINDS.items()},
    }, ""


def _blocks(blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        visible = [(block.begin, block.end)] if block.visible is None else block.visible
        for begin, end in visible:
            yield {
                "kind": block.kind,
                "begin": round(begin, 6),
                "end": round(end, 6),
                "low": block.low,
                "high": block.high,
                "labels": block.labels,
            }


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of the model that ``hparams.yaml`` names, if it is on this machine."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Makes nothing of the Python objects that Lightning may have saved too."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    try:
        saved = yaml.load((folder / "hparams.yaml").read_text(encoding="utf-8"), Loader)
    except (OSError, yaml.YAMLError):
        return None
    model, revision = (saved.get(name) if isinstance(saved, dict) else None for name in ("model", "revision"))
    if not isinstance(model, str):
        return None
    try:
        return Pretrained(model, revision).tokenizer(local_files_only=True)  # runs no code that the run trusted
    except ConfigurationError:
        return None
