"""Explorers that are killed in the middle of long answers: others go on with them, and no token is sampled twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_rft as rft
from lightning_rft.explorer.engines.fake import FakeEngine
from lightning_rft.explorer.engines.requests import Request
from tests.processes import Script

pytestmark = pytest.mark.chaos

SAMPLES, TOKENS = 2, 400

SCRIPT = """
    import json, os, pathlib, signal
    import lightning_rft as rft
    from lightning_rft.explorer.worker import explorer
    from lightning_rft.run.partials import Partials
    from tests.processes import LightEngine, fit, touch

    TOLD, DEAD = pathlib.Path("told"), pathlib.Path("dead")

    class Engine(LightEngine):
        "Writes down what it samples; the one whose tokens rank 0 has been told of is killed, some steps later."
        left = 10
        def start(self, model, **settings):
            super().start(model, **settings)
            explorer._LONG_S, explorer._REPORT_S = 0.3, 0.2
        def note(self, *what):
            with open("engine.jsonl", "a") as file:
                file.write(json.dumps(what) + "\\n")
        def add(self, request):
            kept = 0 if request.kept is None else len(request.kept.token_ids)
            self.note("began", os.getpid(), request.prompt_ids, request.sampling.seed, kept)
            super().add(request)
        def step(self):
            self.note("sampled", os.getpid(), len(self._running))
            done = super().step()
            if TOLD.exists() and not DEAD.exists() and self._running:
                self.left -= 1
                if not self.left:
                    DEAD.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return done

    take = Partials.take
    def taken(self, message):
        take(self, message)
        touch("told")
    Partials.take = taken

    fit(
        engine=Engine(tokens_per_second=200.0, mean_tokens=100_000),
        strategy="STRATEGY",
        explorer_count=EXPLORERS,
        max_restarts=1,
        tasks=["1 + 1 ="],
        max_new_tokens=TOKENS,
        buffer="buffer.sqlite",
    )
"""


def alone(seed: int, prompt_ids: list[int]) -> list[int]:
    """What is sampled without a death."""
    engine = FakeEngine(mean_tokens=100_000)
    engine.start("none", max_model_len=1000, seed=0)
    engine.add(Request("r", tuple(prompt_ids), rft.Sampling(TOKENS, 1.0, seed)))
    done = [completion for _ in range(TOKENS) for completion in engine.step()]
    return list(done[0].token_ids)


@pytest.mark.parametrize(("strategy", "explorers"), [("Synchronous", 1), ("FullyAsynchronous", 2)])
def test_a_long_answer_survives_its_explorer(
    start: Callable[[str], Script], tmp_path: Path, strategy: str, explorers: int
) -> None:
    script = start(
        SCRIPT.replace("STRATEGY", strategy).replace("EXPLORERS", str(explorers)).replace("TOKENS", str(TOKENS))
    )
    assert script.wait() == 0, script.stderr
    notes = [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]
    began = [note[1:] for note in notes if note[0] == "began"]
    first, second = dict.fromkeys(pid for pid, *_ in began)
    sampled = {pid: sum(note[2] for note in notes if note[:2] == ["sampled", pid]) for pid in (first, second)}
    kept = [count for pid, _, _, count in began if pid == second]
    print(f"sampled before the death: {sampled[first]}, kept: {kept}, sampled after it: {sampled[second]}")
    assert [count for pid, *_, count in began if pid == first] == [0] * SAMPLES
    assert len(kept) == SAMPLES and 0 < sum(kept) <= sampled[first] < SAMPLES * TOKENS
    assert sampled[second] == SAMPLES * TOKENS - sum(kept)  # what was kept was not sampled again
    rows = rft.read_buffer(tmp_path / "buffer.sqlite")
    trained = sorted(answer for row in rows for answer in row["token_ids"])
    assert trained == sorted(alone(seed, ids) for seed, ids in {seed: ids for _, ids, seed, _ in began}.items())
