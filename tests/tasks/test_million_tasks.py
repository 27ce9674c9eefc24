"""A million tasks start about as fast as a thousand, and in about as little memory."""

from __future__ import annotations

import json
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
    import lightning_rft as rft
    from lightning_rft.experience import GroupKey
    from lightning_rft.rewards import exact_match
    from lightning_rft.tasks.plan import TaskCursor, TaskPlan
    from lightning_rft.tasks.source import known

    datasets.disable_progress_bars()
    kind, folder = sys.argv[1:]

    def rows(count):
        for index in range(count):
            yield {"question": f"{index} + {index} =", "answer": str(2 * index), "extra": {"level": index % 7}}

    def source(count):
        path = Path(folder) / str(count)
        if kind == "list":
            return list(rows(count))
        if kind == "lines":
            with open(path, "w") as file:
                file.writelines(json.dumps(row) + "\\n" for row in rows(count))
            return path
        columns = {name: [] for name in next(rows(1))}
        for row in rows(count):
            for name, value in row.items():
                columns[name].append(value)
        datasets.Dataset.from_dict(columns).save_to_disk(path)
        if kind == "stream":
            return rft.TaskSet(str(path), streaming=True, steps_per_epoch=10)
        return str(path)

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

    start(source(10))  # whatever is imported on first use
    few, many = source(1_000), source(1_000_000)
    print(json.dumps({"few": start(few), "many": start(many)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["dataset", "stream", "lines", "list"])
def test_seconds_and_memory_until_the_first_groups(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    output = subprocess.run(
        [sys.executable, script, kind, tmp_path],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert output.returncode == 0, output.stderr
    result = json.loads(output.stdout.splitlines()[-1])
    print(kind, result)
    seconds, megabytes, state = (many - few for few, many in zip(result["few"], result["many"], strict=True))
    assert seconds < SECONDS  # of this process, whatever else the machine does
    assert megabytes < MEGABYTES  # at its peak, beside the source itself
    assert state < 1_000  # characters in a checkpoint
