"""A million tasks start about as fast as a thousand, and in about as little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 2.0, 100.0

SCRIPT = """
    import gc, json, sys, time
    from pathlib import Path
    import datasets
    import pyarrow.json
    import lightning_rft as rft
    from lightning_rft.experience import GroupKey
    from lightning_rft.rewards import exact_match
    from lightning_rft.tasks.plan import TaskCursor, TaskPlan
    from lightning_rft.tasks.source import known

    datasets.disable_progress_bars()
    folder = sys.argv[1]

    def sources(count):
        lines, saved = Path(folder) / f"{count}.jsonl", Path(folder) / str(count)
        with open(lines, "w") as file:
            file.writelines(
                f'{{"question": "{i} + {i} =", "answer": "{2 * i}", "extra": {{"level": {i % 7}}}}}\\n'
                for i in range(count)
            )
        datasets.Dataset(pyarrow.json.read_json(lines)).save_to_disk(saved)
        listed = [
            {"question": f"{i} + {i} =", "answer": str(2 * i), "extra": {"level": i % 7}} for i in range(count)
        ]
        stream = rft.TaskSet(str(saved), streaming=True, steps_per_epoch=10)
        return {"dataset": str(saved), "stream": stream, "lines": lines, "list": listed}

    def megabytes(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

    def start(tasks):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began = megabytes("VmRSS"), time.process_time()
        data = rft.RFTDataModule(tasks=tasks, reward=exact_match, engine=rft.FakeEngine(), tasks_per_step=8)
        known(data.tasks, data.val_tasks)
        set_ = data.task_set
        plan = TaskPlan(data.tasks, 8, data.steps_per_epoch, set_.shuffle, 0, goes_on=set_.goes_on)
        cursor = TaskCursor(plan)
        for slot in range(8):
            key = GroupKey(0, slot)
            assert exact_match(cursor.task(key).answer, cursor.task(key)) and cursor.sample_seed(key, 0) >= 0
        state = len(json.dumps(cursor.state_dict()))
        return time.process_time() - began, megabytes("VmHWM") - before, state

    for tasks in sources(10).values():
        start(tasks)  # whatever is imported on first use
    few, many = sources(1_000), sources(1_000_000)
    print(json.dumps({kind: [start(few[kind]), start(many[kind])] for kind in few}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_seconds_and_memory_until_the_first_groups(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    output = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert output.returncode == 0, output.stderr
    for kind, (few, many) in json.loads(output.stdout.splitlines()[-1]).items():
        seconds, megabytes, state = (more - less for less, more in zip(few, many, strict=True))
        print(f"{kind}: {seconds:.2f} s and {megabytes:.0f} MB more than {few[0]:.2f} s and {few[1]:.0f} MB")
        assert seconds < SECONDS, kind  # of this process, whatever else the machine does
        assert megabytes < MEGABYTES, kind  # at its peak, beside the source itself
        assert state < 1_000, kind  # characters in a checkpoint
