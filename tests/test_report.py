"""The report: the page of a real run, and of runs that go on, were cut short, or never began."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.buffer.reader import read_buffer
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.monitor.spans import Span
from lightning_rft.monitor.trace import spans_of, trace
from lightning_rft.report.gathered import _thinned
from lightning_rft.report.logged import read_logged, shares, verdict
from lightning_rft.report.page import write_report
from lightning_rft.report.stored import Stored
from tests.buffer.groups import bring, copy_as_killed
from tests.monitor.drawn_timelines import STORIES
from tests.trainer_and_data import quiet_trainer, seeded_data

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
BREAKS_OUT = '</SCRIPT x=</script><script>document.title="broken"</script><!-- {{data}} & \u2028 "quoted" \\'


class _Page(HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.scripts: list[tuple[dict[str, Any], str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


def parsed(path: Path) -> tuple[_Page, dict[str, Any]]:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    (text,) = [text for attributes, text in page.scripts if attributes.get("id") == "data"]
    assert not set(text) & set("<>&")  # a browser ends a script at more than this parser does
    return page, json.loads(text)


def states_of(buffer: Path) -> Counter[str]:
    groups = {(row["run"], row["batch"], row["slot"], row["round"]): row["state"] for row in read_buffer(buffer)}
    return Counter(groups.values())


class ReportBeside(L.Callback):
    """Has another process write the report of the run in the middle of it."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.batch == 2:
            folder = Path(trainer.log_dir or "")
            before = states_of(folder / "rft" / "buffer.sqlite")
            command = [sys.executable, "-m", "lightning_rft", "report", str(folder)]
            self.printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
            self.written = parsed(folder / "report.html")[1]
            assert before == states_of(folder / "rft" / "buffer.sqlite")  # explorers wait for the weights
            self.states = before


class Run:
    """One real run, in which a task fails, with all that can be logged."""

    def __init__(self, folder: Path, model: Path) -> None:
        def reward(completion: str, task: Any) -> float:
            if task.id == "3":
                raise ValueError("</script><b>no such task")
            return float(sum(map(ord, completion)) % 7)

        self.csv, self.board = CSVLogger(folder / "csv"), TensorBoardLogger(folder / "board")
        self.beside = ReportBeside()
        callbacks = [self.beside, rft.Synchronous(), rft.TimelineCallback()]
        trainer = quiet_trainer(folder, *callbacks, logger=[self.csv, self.board], max_steps=STEPS)
        data = seeded_data(reward=reward, tolerance=rft.Tolerance(retries=0, max_error_rate=1.0))
        trainer.fit(rft.RFTModule(str(model)), data)
        self.folder = Path(self.csv.log_dir)
        self.buffer = self.folder / "rft" / "buffer.sqlite"
        self.page, self.data = parsed(write_report(self.folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Run:
    return Run(tmp_path_factory.mktemp("run"), tiny_model_path)


def test_counts_are_those_of_the_ledger(run: Run) -> None:
    with Ledger.open(run.buffer) as ledger:
        counts = ledger.counts()
    assert run.data["states"] == {state.value: count for state, count in counts.items() if count}
    assert counts[State.TRAINED] == 20 and counts[State.FAILED]  # twice ten tasks, in batches of 4, 4 and 2
    rows = [row for row in read_buffer(run.buffer) if row["sample"] is not None]
    assert run.data["totals"] == {"samples": len(rows), "tokens": sum(row["num_tokens"] for row in rows)}
    assert len(run.data["failures"]) == counts[State.FAILED]
    assert all("</script><b>no such task" in failure["error"] for failure in run.data["failures"])


def test_samples_are_those_of_the_buffer(run: Run) -> None:
    rows = [row for row in read_buffer(run.buffer) if row["sample"] is not None]
    names = ("batch", "slot", "sample", "task_id", "reward", "num_tokens", "finish_reason", "text", "step")
    assert [[sample[name] for name in names] for sample in run.data["samples"]] == [
        [row[name] for name in names] for row in rows
    ]
    prompts = {sample["task_id"]: run.data["prompts"][sample["prompt"]] for sample in run.data["samples"]}
    assert prompts["7"] == "7 + 1 ="


def test_what_the_buffer_says_of_batches_is_what_was_logged(run: Run) -> None:
    logged, source = read_logged(run.folder)
    assert source == "metrics.csv"
    stored = Stored.read(run.buffer, 10).curves()
    assert {"rft/reward", "rft/completion_length_max", "rft/truncated_share", "rft/staleness_max"} <= stored.keys()
    for name, lines in stored.items():
        (line,) = lines.values()
        assert line == [(step, pytest.approx(value)) for step, value in logged[name]], name
        assert [step for step, _ in line] == list(range(STEPS))


def test_curves_come_first_where_they_matter(run: Run) -> None:
    names = [curve["name"] for curve in run.data["curves"]]
    assert names[0] == "rft/reward" and len(names) == len(set(names))
    assert {"rft/entropy", "rft/kl", "rft/grad_norm", "rft/wait_experience_s"} <= set(names)
    assert not {"step", "epoch"} & set(names)
    assert all(len(line) == STEPS for curve in run.data["curves"] if curve["first"] for line in curve["lines"])


def test_the_time_is_shared_out(run: Run) -> None:
    for side in ("trainer", "explorers"):
        assert sum(run.data["waits"][side].values()) == pytest.approx(1)
    assert "The trainer waited" in run.data["advice"]
    assert {track["name"] for track in run.data["timeline"]["tracks"]} == {"explorer 0", "buffer", "trainer"}
    kinds = Counter(block["kind"] for track in run.data["timeline"]["tracks"] for block in track["blocks"])
    assert kinds["train"] == STEPS and set(kinds) <= set(run.data["timeline"]["kinds"])


def test_the_page_needs_nothing_else(run: Run) -> None:
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"' ]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in text
    assert not {"link", "img", "iframe", "object"} & set(run.page.tags)
    assert not re.search(r"innerHTML|outerHTML|document\.write|insertAdjacentHTML|eval\(", text)


def test_a_report_beside_the_run(run: Run) -> None:
    assert run.beside.printed.strip().endswith("report.html")
    assert run.beside.written["states"] == dict(run.beside.states)
    assert run.beside.states["trained"] == 8 and run.beside.states["leased"] == 2
    assert run.beside.written["timeline"] is None  # it is written when fit ends


def test_tensorboards_files_say_what_the_csv_says(run: Run) -> None:
    pytest.importorskip("tensorboard")
    csv, (board, source) = read_logged(run.folder)[0], read_logged(Path(run.board.log_dir))
    assert source == "TensorBoard's files" and board.keys() == csv.keys()
    for name, curve in csv.items():
        assert board[name] == [(step, pytest.approx(value, rel=1e-5)) for step, value in curve], name


def test_without_tensorboard_the_buffer_is_enough(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run.board.log_dir, tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    _, data = parsed(write_report(tmp_path, buffer=run.buffer))
    assert "pip install tensorboard" in data["notes"][0]
    assert data["states"] == run.data["states"] and data["curves"][0]["name"] == "rft/reward"
    assert data["waits"] == {} and data["timeline"] is None


def test_a_run_that_was_killed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rft").mkdir()
    with Ledger.open(tmp_path / "live.sqlite") as ledger:
        ledger.begin()
        for batch, state in enumerate((State.TRAINED, State.LEASED, State.ISSUED)):
            bring(ledger, GroupKey(batch, 0), state)
        copy_as_killed(tmp_path / "live.sqlite", tmp_path / "rft" / "buffer.sqlite")
    (tmp_path / "metrics.csv").write_text("step,rft/kl\n0,0.5\n1,nan\n2,0.2e\n3,")
    whole = (run.folder / "rft" / "timeline.json").read_text()
    (tmp_path / "rft" / "timeline.json").write_text(whole[: len(whole) // 2])
    _, data = parsed(write_report(tmp_path))
    assert data["states"] == {"trained": 1, "leased": 1, "issued": 1}
    assert {curve["name"]: curve["lines"] for curve in data["curves"]}["rft/kl"] == [[[0, 0.5]]]
    assert len(data["samples"]) == 4 and data["prompts"] == []
    assert any("timeline.json cannot be read" in note for note in data["notes"])
    assert any("Prompts are not shown" in note for note in data["notes"])


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_of_nothing(begun: bool, tmp_path: Path) -> None:
    (tmp_path / "rft").mkdir()
    if begun:
        Ledger.open(tmp_path / "rft" / "buffer.sqlite").close()
    _, data = parsed(write_report(tmp_path))
    assert (data["states"], data["curves"], data["samples"], data["failures"]) == ({}, [], [], [])
    assert any("No buffer" in note for note in data["notes"]) != begun


def test_no_text_breaks_out(tmp_path: Path) -> None:
    buffer = tmp_path / "rft" / "buffer.sqlite"
    with Ledger.open(buffer) as ledger:
        ledger.begin()
        key = GroupKey(0, 0)
        ledger.issue(key, BREAKS_OUT, 0, 0)
        turn = Turn((1,), (2,), (-1.0,), (0,), "stop")
        ledger.ready(Group(key, BREAKS_OUT, (Experience(BREAKS_OUT, 0, (turn,), 1.0, BREAKS_OUT),)))
        ledger.issue(GroupKey(0, 1), "other", 0, 0)
        ledger.failed(GroupKey(0, 1), BREAKS_OUT, 0)
    (tmp_path / "metrics.csv").write_text("step,</script><b>\n0,1\n")
    spans = [Span("</script><b>", "rollout", 0.0, 1.0, batch=0)]
    (tmp_path / "rft" / "timeline.json").write_text(json.dumps(trace(spans, title=BREAKS_OUT)))
    page, data = parsed(write_report(tmp_path))
    assert page.tags["script"] == 2 and not page.tags["b"]
    assert data["samples"][0]["text"] == data["samples"][0]["task_id"] == BREAKS_OUT
    assert data["failures"][0]["error"] == data["timeline"]["title"] == BREAKS_OUT
    assert data["timeline"]["tracks"][0]["name"] == data["curves"][0]["name"] == "</script><b>"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_rft.report.command import main

    with pytest.raises(ConfigurationError, match="give the folder that holds rft/"):
        write_report(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and "holds no run" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="there is no buffer"):
        write_report(tmp_path, buffer=tmp_path / "none.sqlite")
    assert not (tmp_path / "report.html").exists()


# What is left out


def rows(groups: int, samples: int) -> Iterator[dict[str, Any]]:
    for batch in range(groups):
        for sample in range(samples):
            yield {
                **{"run": 1, "batch": batch, "slot": 0, "round": 0, "task_id": "7", "state": "trained", "step": batch},
                **{
                    "sample": sample,
                    "reward": 1.0,
                    "rewards": "{}",
                    "metrics": "{}",
                    "num_tokens": 3,
                    "finish_reason": "stop",
                },
                **{"text": "9" * 5000, "oldest_version": batch, "newest_version": batch, "error": None, "attempts": 1},
            }


def test_samples_of_a_long_run_are_spread_over_it() -> None:
    stored = Stored(rows(1000, 4), most_samples=100)
    samples = stored.samples
    batches = sorted({sample["batch"] for sample in samples})
    assert 50 <= len(samples) <= 100 and len(samples) == 4 * len(batches)  # groups are whole
    assert batches == list(range(0, 1000, batches[1]))
    assert stored.total_samples == 4000 and len(stored.curves()["rft/reward"][1]) == 1000
    assert max(len(sample["text"]) for sample in samples) < 2100
    assert len(Stored(rows(1, 9), most_samples=5).samples) == 9  # the only group


def test_long_curves_are_means_of_neighbours() -> None:
    curve = [(step, float(step)) for step in range(2500)]
    thin = _thinned(curve)
    assert len(thin) == 834 and thin[0] == (2, 1.0) and thin[-1] == (2499, 2499.0)
    assert _thinned(curve[:1000]) == curve[:1000]


def test_shares_of_time_by_hand() -> None:
    seconds = {
        **{"rft/wait_experience_s": [3.0, 1.0], "rft/wait_push_s": [1.0, 0.0], "rft/sync_s": [0.0, 1.0]},
        **{"rft/explorer_explore_s": [4.0, 2.0], "rft/explorer_load_s": [0.0, 1.0]},
        **{"rft/explorer_wait_weights_s": [1.0, 2.0]},
    }
    found = shares({name: list(enumerate(values)) for name, values in seconds.items()})
    assert found["explorers"] == pytest.approx(
        {"exploring": 0.6, "waiting for weights": 0.3, "waiting for room": 0.0, "loading weights": 0.1}
    )
    assert found["trainer"] == pytest.approx(
        {"training and the rest": 0.4, "waiting for experience": 0.4}
        | {"waiting before a push": 0.1, "pushing weights": 0.1}
    )
    assert "They wait for each other" in verdict(found)
    assert shares({}) == {}


@pytest.mark.parametrize("name", STORIES)
def test_a_trace_gives_its_spans_back(name: str) -> None:
    spans = STORIES[name]().spans

    def rounded(spans: Sequence[Span]) -> Counter[Span]:
        zero = min(span.begin for span in spans)
        return Counter(
            replace(span, begin=round((span.begin - zero) * 1e6), end=round((span.end - zero) * 1e6)) for span in spans
        )

    assert rounded(spans_of(json.loads(json.dumps(trace(spans))))) == rounded(spans)
