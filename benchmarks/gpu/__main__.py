"""Entry point of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.gpu.machine import Machine, look, may_have_gpus
from benchmarks.gpu.measurement import Outcome
from benchmarks.gpu.printing import as_json, head, line, summary
from benchmarks.gpu.processes import Child, outcomes, preload

NEEDED = ("torch", "lightning", "transformers", "torchmetrics", "cloudpickle", "msgspec", "numpy", "typing_extensions")
SECTIONS = ("training", "parity", "memory", "strategies", "vllm", "transports", "placement", "resume")
RESULTS = Path(__file__).parents[1] / "results"
_LOOK_S = 600.0  # a driver may hang, and a model is written


def run(modules: Sequence[str], machine: Machine, method: str, deadline_s: float, out: Path) -> int:
    """Prints the table while it grows, writes it as JSON, and returns the exit status."""
    results: dict[str, list[Outcome]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for module in modules:
        section = module.rpartition(".")[2]
        results[section] = []
        with closing(outcomes(module, machine, method, deadline_s)) as coming:
            for outcome in coming:
                print(line(section, outcome), flush=True)
                results[section].append(outcome)
                out.write_text(json.dumps(as_json(machine, results), indent=1) + "\n", encoding="utf-8")
    print(f"\n{summary(results)}: {out}; logs are in {machine.folder}")
    return int(any(outcome.failed for found in results.values() for outcome in found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Looks at the machine, then measures section by section."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measures what works on this machine's GPUs, and how fast."
    )
    parser.add_argument("sections", nargs="*", default=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a minute: a tiny model, two steps, no vLLM")
    parser.add_argument("--model", help="folder or hub name; left out, one with random weights is made up")
    parser.add_argument("--steps", type=int, help="of each run, at least 2")
    parser.add_argument("--deadline", type=float, default=900.0, metavar="S", help="seconds that a row may take [900]")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="for logs and what runs write [runs/gpu]")
    parser.add_argument(
        "--out", type=Path, help="results [benchmarks/results/gpu.json; FOLDER/gpu.json without a GPU or with --quick]"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps {options.steps}: at least 2, since the first does not count")
    modules = [name if "." in name else f"benchmarks.gpu.sections.{name}" for name in options.sections]
    if unknown := [name for name in options.sections if "." not in name and name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}: choose of {', '.join(SECTIONS)}, or name a module")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(
            f"{sys.executable} has no {', '.join(missing)}: pip install {' '.join(missing)}; without a network, "
            "`pip download` them elsewhere, and `pip install --no-index --find-links FOLDER` them here"
        )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trainer and explorers share the cores
    method = "spawn" if may_have_gpus() else "forkserver"
    if method == "forkserver":
        preload(modules)
    folder = options.folder.resolve()
    child = Child(method, folder / "look.log", look, options.model, options.steps, options.quick, folder)
    try:
        machine: Machine = child.receive(_LOOK_S)
    except (EOFError, TimeoutError) as error:
        print(f"the machine cannot be looked at: {error or child.status()}", file=sys.stderr)
        return 1
    finally:
        child.end()
    print(head(machine))
    kept = machine.gpus and not machine.quick
    return run(modules, machine, method, options.deadline, options.out or (RESULTS if kept else folder) / "gpu.json")


if __name__ == "__main__":
    sys.exit(main())
