"""An environment of ``verifiers`` against the policy's token-in-token-out route.

``verifiers`` wants an older ``openai`` than other packages here: this runs in an environment of its own, or is skipped.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import lightning_rft as rft
from tests.trainer_and_data import quiet_trainer

pytest.importorskip("verifiers", reason="verifiers is not installed: it wants an environment of its own")


def test_what_verifiers_has_seen_is_what_is_trained(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(tiny_model_path))
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import verifiers_env

    async def workflow(task: rft.Task, policy: rft.Policy) -> rft.Answer:
        trace = await verifiers_env.roll_out(task, policy)
        branch = trace.branches[-1]
        sampled = [token for token, own in zip(branch.token_ids, branch.sampled_mask, strict=True) if own]
        seen = {"ids": sampled, "reward": trace.reward}
        return rft.Answer(repr(seen), reward=trace.reward)

    questions = [task.data.prompt for task in list(verifiers_env.environment().taskset)[:2]]
    data = rft.RFTDataModule(
        [rft.Task(asked, metadata={"number": at}) for at, asked in enumerate(questions)],
        engine=rft.TransformersEngine(),
        workflow=workflow,
        tasks_per_step=2,
        samples_per_task=2,
        max_new_tokens=12,
        buffer="buffer.sqlite",
    )
    quiet_trainer(tmp_path, rft.Synchronous(), max_steps=1).fit(rft.RFTModule(tiny_model_path), data)

    rows: list[dict[str, Any]] = list(rft.read_buffer("buffer.sqlite"))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"trained"}
    for row in rows:
        seen = ast.literal_eval(row["text"])
        assert len(row["token_ids"]) == 1 and list(row["token_ids"][0]) == seen["ids"] != []
        assert row["reward"] == seen["reward"]
