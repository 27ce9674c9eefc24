"""The table of samples: in every logger, in the terminal, and with texts that would break either."""

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.monitor.samples import _chosen, _printed
from lightning_rft.monitor.texts import harmless, markdown, plain, shortened
from tests.monitor.test_timeline import fit as fit_batches
from tests.terminal import Recording
from tests.trainer_and_data import quiet_trainer, stored_data

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = "a|b\n| --- |\x1b[2J\x9b31m\r\x00<script>alert(1)</script>![](http://x.y/z)\u202e\ud800 `*x*`"
LONG = "9" * 100_000
TEXTS = {"0": ("fine", EVIL), "1": ("\ttab", LONG), "2": ("", "ü 你好 🙂")}


def write_buffer(path: Path) -> Path:
    """Three groups of two samples, with texts of all sorts and parts of rewards."""
    with Ledger.open(path) as ledger:
        ledger.begin()
        for slot, (task, texts) in enumerate(TEXTS.items()):
            key = GroupKey(0, slot)
            ledger.issue(key, task, epoch=0, explorer=0)
            turn = Turn((4, 5, 6), (7, 8, 9), (-1.0,) * 3, (0, 0, 0), "stop")
            texts_stored = (text.encode("utf-8", "replace").decode() for text in texts)  # as SQLite takes them
            samples = [
                Experience(task, index, (turn,), float(index), text, rewards={"right": float(index), "form": 0.5})
                for index, text in enumerate(texts_stored)
            ]
            ledger.ready(Group(key, task, tuple(samples)))
    return path


@dataclass
class Client:
    """Has what MLflow's client has."""

    tables: list[tuple[str, dict[str, list[Any]], str]] = field(default_factory=list)

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        self.tables.append((run_id, data, artifact_file))


class MLFlowLike(Logger):
    """Has what Lightning's MLFlowLogger has."""

    run_id = "0123"
    name = version = "mlflow"

    def __init__(self) -> None:
        self.experiment = Client()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_buffer(tmp_path_factory.mktemp("stored") / "buffer.sqlite")


def fit(folder: Path, model: Path, buffer: Path, callback: L.Callback, *others: L.Callback, **changes: Any) -> None:
    """Three batches of a group each."""
    trainer = quiet_trainer(folder, callback, *others, **{"max_epochs": 1} | changes)
    trainer.fit(rft.RFTModule(str(model)), stored_data(buffer, tasks_per_step=1))


@dataclass
class Logged:
    csv: Path
    tensorboard: Path
    mlflow: Client
    wandb: list[Path]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path, buffer: Path) -> Logged:
    """What one fit wrote to every logger, a table in its first and third step."""
    folder = tmp_path_factory.mktemp("logged")
    csv, board, mlflow = CSVLogger(folder / "csv"), TensorBoardLogger(folder / "board"), MLFlowLike()
    loggers: list[Logger] = [csv, board, mlflow]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DIR": str(folder)}.items():
            patch.setenv(name, value)
        try:
            from lightning.pytorch.loggers import WandbLogger

            wandb = WandbLogger(project="rft", offline=True, save_dir=folder / "wandb")
            loggers.append(wandb)
        except ModuleNotFoundError:
            wandb = None
        fit(folder, tiny_model_path, buffer, rft.SamplesCallback(every_n_steps=2, samples=3), logger=loggers)
        if wandb is not None:
            import wandb as client

            wandb.experiment.finish()
            client.teardown()
    tables = sorted(folder.glob("wandb/**/*.table.json"))
    return Logged(Path(csv.log_dir), Path(board.log_dir), mlflow.experiment, tables)


COLUMNS = [
    *("step", "task_id", "prompt", "completion", "reward", "reward_right", "reward_form", "version", "staleness"),
    *("finish_reason", "tokens"),
]


def rows_of(logged: Logged) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logged.csv / "samples.jsonl").read_text().splitlines()]


def test_beside_a_csv_logger_there_is_a_line_per_sample(logged: Logged) -> None:
    rows = rows_of(logged)
    assert [row["step"] for row in rows] == [0, 0, 2, 2]
    assert all(list(row) == COLUMNS for row in rows)
    assert rows[1] == {
        "step": 0,
        "task_id": rows[0]["task_id"],
        "prompt": rows[0]["prompt"],
        "completion": rows[1]["completion"],
        "reward": 1.0,
        "reward_right": 1.0,
        "reward_form": 0.5,
        "version": 0,
        "staleness": 0,
        "finish_reason": "stop",
        "tokens": 3,
    }
    assert [row["staleness"] for row in rows[2:]] == [2, 2]
    assert rows[0]["prompt"] == "<|user|><|assistant|>0"  # as the policy read it
    assert max(len(row["completion"]) for row in rows) < 4100


def test_mlflow_has_the_same_columns(logged: Logged) -> None:
    rows = rows_of(logged)
    assert [(run, file) for run, _, file in logged.mlflow.tables] == [("0123", "rft/samples.json")] * 2
    for start, (_, data, _) in zip((0, 2), logged.mlflow.tables, strict=True):
        assert data == {name: [row[name] for row in rows[start : start + 2]] for name in COLUMNS}


def test_weights_and_biases_has_the_same_table(logged: Logged) -> None:
    pytest.importorskip("wandb")
    tables = [json.loads(path.read_text()) for path in logged.wandb]
    assert all(table["columns"] == COLUMNS for table in tables)
    rows = sorted(tuple(row) for table in tables for row in table["data"])
    assert rows == sorted(tuple(row.values()) for row in rows_of(logged))


def test_tensorboard_has_the_same_table_as_text(logged: Logged) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(logged.tensorboard))
    events.Reload()
    tables = events.Tensors("rft/samples/text_summary")
    assert [table.step for table in tables] == [0, 2]
    for start, table in zip((0, 2), tables, strict=True):
        rows = [[str(value) for value in row.values()] for row in rows_of(logged)[start : start + 2]]
        assert cells(table.tensor_proto.string_val[0].decode()) == [COLUMNS, *rows]


def test_other_metrics_are_none_the_worse(logged: Logged) -> None:
    header = (logged.csv / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"rft/reward", "rft/reward_right", "rft/reward_form", "rft/reward_std", "rft/truncated_share"} <= set(header)


def test_without_a_logger_the_file_is_in_the_runs_folder(tmp_path: Path, tiny_model_path: Path, buffer: Path) -> None:
    fit(tmp_path, tiny_model_path, buffer, rft.SamplesCallback(samples=1))
    (row,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert row["step"] == 0 and list(row) == COLUMNS


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_terminal_shows_them_above_the_bar(
    bar: type[L.Callback], tmp_path: Path, tiny_model_path: Path, buffer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with Recording(80) as recording:
        monkeypatch.setattr(sys, "stdout", recording.stream)
        callback = rft.SamplesCallback(every_n_steps=1, terminal=True)
        fit(tmp_path, tiny_model_path, buffer, callback, bar(), enable_progress_bar=True)
        recording.stream.flush()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    screen = recording.screen
    for step in range(3):
        block = _printed([row for row in rows if row["step"] == step]).split("\n")
        assert max(map(len, block)) < 80
        place = screen.index(block[0])
        assert screen[place : place + len(block)] == block
    assert sum("Epoch 0" in line for line in screen) == 1
    assert screen.index(next(line for line in screen if "Epoch 0" in line)) > place


def test_samples_are_of_as_many_tasks_as_possible() -> None:
    turn = Turn((1,), (2,), (-1.0,), (0,), "stop")

    def group(task: str, samples: int) -> Group:
        return Group(GroupKey(0, 0), task, tuple(Experience(task, index, (turn,), 0.0) for index in range(samples)))

    chosen = _chosen([group("a", 3), group("b", 1), group("c", 2)], 5)
    assert [(sample.task_id, sample.sample) for sample in chosen] == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)]
    assert len(_chosen([group("a", 3)], 5)) == 3


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"samples": 0}])
def test_settings_that_show_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        rft.SamplesCallback(**wrong)


def test_there_must_be_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="SamplesCallback needs an RFTDataModule"):
        fit_batches(tmp_path, rft.SamplesCallback(), data=L.LightningDataModule())


# Texts


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"table", "thead", "tbody", "tr", "th", "td", "br"}, tag
        assert not attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.removesuffix("\n")


def cells(text: str) -> list[list[str]]:
    """The cells of a table, as TensorBoard's renderer sees them."""
    parser = _Cells()
    parser.feed(pytest.importorskip("markdown").markdown(text, extensions=["tables"]))
    parser.close()
    return parser.rows


def without_edges(text: str) -> str:
    return "\n".join(line.strip() for line in text.split("\n")).strip()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=2))
def test_no_text_breaks_a_table(texts: list[str]) -> None:
    header, row = cells(markdown(["one", "two"], [dict(zip(("one", "two"), texts, strict=True))]))
    assert header == ["one", "two"]
    assert [without_edges(cell) for cell in row] == [without_edges(harmless(text)) for text in texts]


@settings(deadline=None)
@given(st.text())
def test_a_harmless_text_obeys_nothing(text: str) -> None:
    clean = harmless(text)
    assert not {unicodedata.category(character) for character in clean if character != "\n"} & {"Cc", "Cf", "Cs", "Co"}
    assert harmless(clean) == clean
    clean.encode()  # no half of a surrogate pair is left


def test_evil_texts() -> None:
    assert harmless("a\r\nb\rc") == "a\nb\\rc"
    assert "\\x1b[2J" in harmless(EVIL) and "\\u202e" in harmless(EVIL) and "\\ud800" in harmless(EVIL)
    (_, row) = cells(markdown(["text", "none"], [{"text": EVIL, "none": None}]))
    assert without_edges(row[0]) == without_edges(harmless(EVIL)) and not row[1].strip()


@settings(deadline=None)
@given(st.text(max_size=300), st.integers(20, 80))
def test_a_block_keeps_to_its_width(text: str, width: int) -> None:
    lines = plain(text, {"prompt": text, "completion": text}, width).split("\n")
    assert len(lines) <= 17 and max(map(len, lines)) <= max(width, len("completion") + 1 + len("… [300 lines] …"))


def test_the_ends_of_a_long_text_are_kept() -> None:
    assert shortened("abc", 3) == "abc"
    text = shortened(LONG, 100)
    assert text.startswith("9" * 50) and text.endswith("9" * 50) and "[99900 characters]" in text
