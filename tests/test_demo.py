"""The demo from beginning to end, with a tiny model and an engine that computes nothing."""

import json
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = f"""
import argparse
import os
import sys
from pathlib import Path

import lightning_rft as rft
from tests.processes import MODEL

sys.path.insert(0, {str(EXAMPLES)!r})
import demo

demo.explorers = rft.ExplorerPool(rft.FakeEngine(), log_dir="explorers")
demo.smollm2 = lambda folder: Path(os.environ[MODEL])
demo.main(argparse.Namespace(steps=2, seed=0, lr=1e-5, out=Path.cwd()))
"""


def test_the_demo_trains_validates_and_writes_what_it_says(start, tmp_path):
    script = start(SCRIPT)
    assert script.wait(90) == 0, script.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["held_out_tasks"] == 100
    assert 0 <= summary["accuracy_after"] <= 1
    assert (tmp_path / "learning_curve.png").stat().st_size > 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "Greedy accuracy on 100 held-out sums" in script.stdout
    assert script.stdout.count("after:") == 3
