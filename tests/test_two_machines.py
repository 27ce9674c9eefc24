"""Two machines, made of network namespaces: weights and ranks between them, on a thin line and on one that is cut."""

from __future__ import annotations

import re
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.machines import Machine, Machines
from tests.processes import Script, Zygote, until
from tests.test_ranks import REWARDS, TRAIN, TRAINS, write_buffer

StartOn = Callable[..., Script]

ENTER = """
    import os
    from tests.machines import enter
    enter(os.environ["MACHINE"])
"""


@pytest.fixture
def start_on(zygote: Zygote, tmp_path: Path, tiny_model_path: Path) -> Iterator[StartOn]:
    """Starts a script on a machine, in a folder of its own or one that is shared; at the end all must have ended."""
    scripts: list[Script] = []
    mark = uuid.uuid4().hex

    def start_on(machine: Machine, source: str, folder: Path | None = None, **variables: str) -> Script:
        place = tmp_path / machine.name if folder is None else folder
        place.mkdir(exist_ok=True)
        variables = machine.variables | {"MACHINE": machine.name} | variables
        scripts.append(zygote.start(ENTER + source, place, tiny_model_path, mark, variables))
        return scripts[-1]

    yield start_on
    try:
        for script in scripts:
            script.wait(20)
            script.gone()
    finally:
        for script in scripts:
            script.kill()


# Weights


class Push:
    """A push from the first machine to the second."""

    def __init__(self, machines: Machines, start_on: StartOn, folder: Path, timeout_s: float) -> None:
        shared = folder / "shared"
        shared.mkdir()
        self.shared = shared

        def half(machine: Machine, call: str) -> Script:
            # each with output of its own, and the working directory that both write their files to
            source = f"""
    os.chdir({str(shared)!r})
    from tests.sync import halves
    halves.{call}
"""
            return start_on(machine, source)

        self.trainer = half(machines.one, f"trainer({machines.one.address!r}, {timeout_s})")
        self.explorer = half(machines.two, "explorer()")

    def arrives(self) -> None:
        """Returns when the first of it has arrived."""
        until((self.shared / "arrives").exists, "the first tensor")

    def ended(self) -> list[tuple[str, float]]:
        """How it ended for trainer and explorer, and the seconds that it took."""
        said = []
        for script in (self.trainer, self.explorer):
            assert script.wait(30) == 0, script.stderr
            *words, seconds = script.stdout.splitlines()
            said.append((" ".join(words), float(seconds)))
        return said


def test_what_arrives_on_another_machine_is_what_was_sent(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    (sent, _), (came, _) = Push(machines, start_on, tmp_path, timeout_s=20).ended()
    assert sent.split() == ["pushed", came.split()[1]] and came.startswith("loaded")


def test_a_thin_line_and_one_that_is_cut_for_a_while_take_longer(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    machines.thin("32mbit")  # a second for all
    push = Push(machines, start_on, tmp_path, timeout_s=20)
    push.arrives()
    machines.cut()
    assert not (push.shared / "loaded").exists()
    machines.mend()
    (sent, _), (came, seconds) = push.ended()
    assert sent.split() == ["pushed", came.split()[1]] and came.startswith("loaded")
    assert seconds > 0.7


def test_a_line_that_is_cut_for_good_ends_the_push_within_its_deadline(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    machines.thin("16mbit")  # two seconds for all
    push = Push(machines, start_on, tmp_path, timeout_s=3)
    push.arrives()
    machines.cut()
    assert not (push.shared / "loaded").exists()
    (sent, trainers), (came, explorers) = push.ended()
    assert sent.startswith("LinkError a weight push passed its deadline: raise CollectiveTransport(timeout_s")
    assert came.startswith("LinkError the weight transport broke off")
    assert 3 < trainers < 3 + 5 and explorers < 3 + 2


RUN = """
    from pathlib import Path
    import lightning as L
    import lightning_rft as rft
    from tests.processes import LightEngine, fit, touch, until

    class Engine(LightEngine):
        def prepare(self):
            import lightning_rft.sync.transports.gloo  # or a push waits for it
            from tests.machines import enter
            enter("{two}")  # this process, whose channel is a socket pair
            super().prepare()

        def load(self, manifest, version):
            touch(f"loads-{{version}}")
            super().load(manifest, version)

    class Pool(rft.ExplorerPool):
        address = "{one}"

    class Hold(L.Callback):
        def on_train_batch_end(self, *_):
            touch("trained")
            until(lambda: Path("go").exists(), "go")

    fit(callbacks=(Hold(),), transport=rft.CollectiveTransport("gloo", timeout_s=4.0),
        explorers=Pool(Engine(), max_restarts=0))
"""


def test_a_run_whose_line_is_cut_in_a_push_ends_with_the_reason(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    run = start_on(machines.one, RUN.format(one=machines.one.address, two=machines.two.name))
    run.wait_for("trained")
    machines.thin("2mbit")  # two seconds for a push
    (tmp_path / machines.one.name / "go").touch()
    run.wait_for("loads-1")
    machines.cut()
    began = time.monotonic()
    assert run.wait(30) == 1
    assert time.monotonic() - began < 4 + 5 + 4 + 3, "deadline, time to settle and to meet again, end of all processes"
    # of both ends, whichever comes to its deadline first; in the second case they tried to meet again
    reason = "(LinkError: a weight push passed its deadline|explorer 0 did not join the weight transport in time)"
    assert re.search(reason + r": raise CollectiveTransport\(timeout_s=\.\.\.\)", run.stderr)


HIDDEN = """
    from pathlib import Path
    import lightning_rft as rft
    from tests.processes import LightEngine, fit

    class Engine(LightEngine):
        def prepare(self):
            import lightning_rft.sync.transports.checkpoint  # or a push waits for it
            from tests.machines import hide
            hide(Path("{folder}"))
            super().prepare()

    fit(engine=Engine(), transport=rft.CheckpointTransport("{folder}", timeout_s=6.0))
"""


def test_an_explorer_that_does_not_see_the_folder_says_so(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    run = start_on(machines.one, HIDDEN.format(folder=tmp_path / "weights"))
    assert run.wait(30) == 1
    last = run.stderr.rstrip().splitlines()[-1]
    assert "ConfigurationError: the explorer on " in last
    assert f"does not see the folder {tmp_path / 'weights'}" in last and "CheckpointTransport(dirpath=...)" in last


# Ranks


def nodes(machines: Machines, start_on: StartOn, source: str) -> list[Script]:
    """Starts a script for each of two nodes, as a cluster does."""
    return [
        start_on(
            machine,
            source,
            **{"MASTER_ADDR": machines.one.address, "MASTER_PORT": "29500", "NODE_RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, machine in enumerate((machines.one, machines.two))
    ]


NOTE_HOST = """
    from pathlib import Path
    from lightning_rft.trainer import rendezvous
    listen = rendezvous.listen
    rendezvous.listen = lambda host, backlog: Path("host").write_text(host) and listen(host, backlog)
"""


def test_two_nodes_train_what_two_ranks_of_one_do(
    machines: Machines,
    start_on: StartOn,
    start_ranks: Callable[[str], list[Script]],
    tmp_path: Path,
) -> None:
    """Bit for bit, with a reference model whose log-probs the ranks compute together."""
    buffer = write_buffer(tmp_path, REWARDS, turns=2)

    def source(devices: str, result: Path) -> str:
        return textwrap.dedent(
            TRAIN.format(
                **{"buffer": buffer, "devices": devices, "strategy": "'ddp'", "result": result, "accumulate": 1},
                **{"optimizer": "SGD(parameters, lr=1.0)", "precision": "32-true"},
                module="max_tokens_per_micro_batch=25, objective=rft.GSPO(kl=rft.KL(0.1), correction=None)",
            )
        )

    results = [tmp_path / "nodes.pt", tmp_path / "ranks.pt"]
    on_nodes = nodes(machines, start_on, NOTE_HOST + textwrap.indent(source("1, num_nodes=2", results[0]), " " * 4))
    for script in [*on_nodes, *start_ranks(source("2", results[1]))]:
        assert script.wait(120) == 0, script.stderr
    (weights, logged), (expected, expected_logged) = map(torch.load, results)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert torch.equal(logged.nan_to_num(0.5), expected_logged.nan_to_num(0.5))
    assert not torch.equal(logged[0], logged[1]), "nothing was trained"
    assert (tmp_path / machines.one.name / "host").read_text() == machines.one.address


def steps(machines: Machines, scripts: list[Script], folder: Path) -> None:
    """Returns when both ranks have begun another step, and so have ended the one before together."""
    for _ in range(2):
        for script, machine in zip(scripts, (machines.one, machines.two), strict=True):
            (folder / machine.name / "trains").unlink(missing_ok=True)
            script.wait_for("trains")


def test_a_line_between_nodes_is_survived_if_it_comes_back_and_else_ends_both(
    machines: Machines, start_on: StartOn, tmp_path: Path
) -> None:
    shorter = """
    from lightning_rft.trainer import ranks
    ranks.SILENCE_S = 4.0
"""
    source = TRAINS.replace("devices=2", "devices=1, trainer_settings={'num_nodes': 2}")
    scripts = nodes(machines, start_on, shorter + source)
    steps(machines, scripts, tmp_path)
    machines.cut()
    time.sleep(1)  # how long it is cut
    machines.mend()
    steps(machines, scripts, tmp_path)
    machines.cut()
    began = time.monotonic()
    for script in scripts:
        assert script.wait(30) == 1
        assert "has given no sign of life for 4 seconds" in script.stderr
    assert time.monotonic() - began < 4 + 4 + 5, "silence, what is left to a rank to end by itself, and its end"
