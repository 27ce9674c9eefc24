"""The demo from beginning to end, with a tiny model and an engine that computes nothing."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import lightning_rft as rft

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_demo_trains_validates_and_writes_what_it_says(tiny_model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "explorers", rft.ExplorerPool(rft.FakeEngine(), log_dir=tmp_path / "explorers"))
    monkeypatch.setattr(demo, "smollm2", lambda folder: tiny_model_path)

    demo.main(argparse.Namespace(steps=2, seed=0, lr=1e-5, out=tmp_path))

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["held_out_tasks"] == 100
    assert 0 <= summary["accuracy_after"] <= 1
    assert (tmp_path / "learning_curve.png").stat().st_size > 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    said = capsys.readouterr().out
    assert "Greedy accuracy on 100 held-out sums" in said
    assert said.count("after:") == demo.SHOWN
