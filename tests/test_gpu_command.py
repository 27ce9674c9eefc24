"""``make gpu``: on a CPU every section runs or says why not, and one that dies is a row of the table, not its end."""

from __future__ import annotations

import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import sections
from benchmarks.gpu.__main__ import SECTIONS, main, run
from benchmarks.gpu.machine import QUICK, Machine
from benchmarks.gpu.models import LARGE, LARGE_VOCABULARY, enlarged
from benchmarks.gpu.peaks import card_tflops
from lightning_rft.model_folder import Pretrained
from lightning_rft.testing import tiny_model
from tests.processes import until

ROOT = Path(__file__).parents[1]
DEADLINE_S = 8.0  # far longer than a process takes to start, also beside other work

# On a CPU all else is measured, whatever is installed.
SKIPPED = {
    ("parity", "flex_attention, 32-true"): "no backward on CPUs",
    ("parity", "flex_attention, bf16-mixed"): "no backward on CPUs",
    ("vllm", "strategies"): "vLLM",
    ("transports", "NCCL"): "no GPU",
    ("transports", "NCCL beside training, from a copy"): "no GPU",
    ("transports", "NCCL beside training, blocking"): "no GPU",
    ("transports", "CUDA IPC, on the trainer's GPU"): "no GPU",
    ("transports", "Gloo, on the trainer's GPU"): "no GPU",
    ("placement", "shared"): "no GPU",
    ("placement", "separate"): "no GPU",
}
MEASURED = {
    "training": ["one large matrix product", "shared rows", "a row per sample"],
    "parity": ["sdpa, 32-true", "eager, 32-true", "sdpa, bf16-mixed", "eager, bf16-mixed"],
    "memory": ["output head", "micro-batches"],
    "strategies": [
        f"{name}, 2 explorers"
        for name in ("Synchronous", "OneStepOffPolicy", "FullyAsynchronous", "MultiExplorerAsynchronous")
    ],
    "vllm": [],
    "transports": ["Gloo", "checkpoint in memory", "checkpoint on a disk"],
    "placement": [],
    "resume": ["half-way, then on"],
}


def machine(folder: Path) -> Machine:
    return Machine(
        gpus=(), precision="32-true", vllm=False, versions={}, model="", work=QUICK, quick=True, folder=folder
    )


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_every_section_runs_or_says_why_not(tmp_path: Path) -> None:
    # what hardware would choose is set: two precisions, without a GPU
    chosen = {"CUDA_VISIBLE_DEVICES": "", "LIGHTNING_RFT_BF16": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--folder", str(tmp_path), "--deadline", "120"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, dict[str, Any]]] = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(found) == list(MEASURED) == list(SECTIONS)
    skipped = {
        (section, what): entry["skipped"]
        for section, entries in found.items()
        for what, entry in entries.items()
        if "skipped" in entry
    }
    assert skipped.keys() == SKIPPED.keys()
    assert all(reason in skipped[row] for row, reason in SKIPPED.items())
    for section, entries in found.items():
        assert [what for what in entries if (section, what) not in SKIPPED] == MEASURED[section]
        for what in MEASURED[section]:
            figures = [value for value in entries[what].values() if isinstance(value, (int, float))]
            assert figures and all(map(math.isfinite, figures)), (section, what, entries[what])
            assert f"{section:12} {what}" in done.stdout
    assert found["parity"]["sdpa, 32-true"]["shared_rows"] and found["parity"]["sdpa, 32-true"]["chunked_head"]
    assert found["parity"]["eager, bf16-mixed"]["gradient_error"] > found["parity"]["eager, 32-true"]["gradient_error"]
    assert found["memory"]["micro-batches"]["micro_batch_mib"] < found["memory"]["micro-batches"]["whole_group_mib"]
    assert found["strategies"]["Synchronous, 2 explorers"]["staleness_max"] == 0
    assert found["resume"]["half-way, then on"]["weights_difference"] < 1e-3


def test_every_section_is_on_the_list() -> None:
    assert {module.name for module in pkgutil.iter_modules(sections.__path__)} == set(SECTIONS)


def test_what_crashes_or_hangs_is_a_row(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    modules = ["tests.failing_section", "tests.no_such_section"]
    assert run(modules, machine(tmp_path), "spawn", DEADLINE_S, out) == 1
    found = json.loads(out.read_text())["sections"]
    rows, missing = found["failing_section"], found["no_such_section"]
    assert list(rows) == ["first", "crashes", "after a crash", "hangs", "raises", "is refused", "last"]
    assert "SIGKILL" in rows["crashes"]["failed"] and "the last words" in rows["crashes"]["failed"]
    assert rows["hangs"]["failed"] == f"nothing came of it for {DEADLINE_S:g} s"
    assert rows["raises"]["failed"] == "ZeroDivisionError: as it should"
    assert rows["is refused"] == {"skipped": "2 GPUs are not enough"}
    assert len({rows[what]["pid"] for what in ("first", "after a crash", "last")}) == 3
    assert "no_such_section" in missing["(the section itself)"]["failed"]
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        until(lambda pid=pid: gone(pid), f"the end of {pid}")  # what it started, too


def test_a_section_ends_with_the_command(tmp_path: Path) -> None:
    source = f"""
        from pathlib import Path
        from benchmarks.gpu.processes import Child
        from tests.failing_section import hang

        folder = Path({str(tmp_path)!r})
        Child("spawn", folder / "log", hang, folder).receive(300.0)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT) as runner:
        try:
            pids = tmp_path / "pids"
            until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the section that hangs")
        finally:
            runner.send_signal(signal.SIGKILL)
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: gone(pid), f"the end of {pid}")


def test_the_model_of_a_gpu_has_its_own_shape_and_says_what_it_samples(tmp_path: Path) -> None:
    folder = enlarged(tiny_model(tmp_path, vocab_size=4096), **LARGE | {"num_hidden_layers": 2, "hidden_size": 128})
    model, tokenizer = Pretrained.of(folder).load(), Pretrained.of(folder).tokenizer()
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 128)
    assert model.get_input_embeddings().weight.shape == (4096, 128)
    assert len({tokenizer.decode([token]) for token in range(2000, 4096)}) == 2096  # so rewards differ
    assert 0x4E00 + LARGE_VOCABULARY < 0xD800  # the tokens of a real one are characters, too


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B200", 2250),
        ("Tesla T4", 65),
    ],
)
def test_peaks_of_cards(name: str, tflops: float | None) -> None:
    assert card_tflops(name) == tflops


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (["parity"], "msgspec", "has no msgspec: pip install msgspec;"),
        (["speed"], "", "no section speed: choose of training, parity,"),
        (["--steps", "1"], "", "--steps 1: at least 2"),
    ],
)
def test_what_cannot_work_is_said_first(
    arguments: list[str],
    missing: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else True)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def made(*arguments: str) -> str:
    """The commands that make would run."""
    outer = ("ARGS", "PYTHON", "DEPS", "VENV", "MAKEFLAGS", "MAKELEVEL")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_takes_an_interpreter_as_it_is() -> None:
    assert made("gpu", "PYTHON=python9", "ARGS=--quick").split("\n")[0] == "python9 -m benchmarks.gpu --quick"
    assert made("gpu").splitlines() == [".ci/install", ".venv/bin/python -m benchmarks.gpu "]


def test_it_is_none_of_the_benchmarks_that_take_hours() -> None:
    (loop,) = (line for line in made("bench").splitlines() if "for name in" in line)
    assert " weight_sync" in loop and " gpu" not in loop
