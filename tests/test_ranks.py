"""Several trainer ranks: they train what one would, and what ends one of them ends all."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Script

Start = Callable[[str], Script]
StartRanks = Callable[[str], list[Script]]

SHARDED = "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)"


def test_lightnings_launcher(start: Start) -> None:
    script = start("""
        from tests.processes import fit
        sets = {"one": ["2 + 2 ="], "two": ["2 + 3 =", "2 + 4 ="]}
        trainer = fit(devices=2, parallel="ddp", val_tasks=sets, val_samples=2, samples_per_task=3)
        print("rank", trainer.global_rank, "steps", trainer.global_step, trainer.callback_metrics["val/version"])
        print(sorted((name, float(value)) for name, value in trainer.callback_metrics.items() if "val/" in name))
    """)
    assert script.wait() == 0, script.stderr
    script.gone()
    *measured, first, second = sorted(script.stdout.splitlines())
    assert [first, second] == [f"rank {rank} steps 3 tensor(3.)" for rank in range(2)]
    assert len(measured) == 2 and measured[0] == measured[1] and "'val/two/pass_at_2'" in measured[0]
    assert "Traceback" not in script.stderr


@pytest.mark.parametrize("parallel", ["ddp_notebook", "ddp_spawn"])
def test_weights_come_back_from_processes_that_lightning_starts_by_itself(parallel: str, start: Start) -> None:
    script = start(f"""
        import os
        import torch
        import lightning_rft as rft
        from tests.processes import MODEL, fit, share_of_letters

        def adam(parameters):  # no lambda, since what is spawned must pickle
            return torch.optim.AdamW(parameters, lr=1e-3)

        class Module(rft.RFTModule):
            def __init__(self, model):
                super().__init__(model, optimizer=adam)

        if __name__ == "__main__":
            trained = fit(Module, devices=2, parallel="{parallel}", reward=share_of_letters)
            weights = dict(trained.lightning_module.weights())
            before = rft.RFTModule(os.environ[MODEL])
            before.configure_model()
            print(all(bool((weights[name] != tensor).any()) for name, tensor in before.weights() if tensor.ndim == 2))
    """)
    assert script.wait(180.0) == 0, script.stderr
    assert script.stdout.splitlines()[-1] == "True"


# What is computed


TRAIN = """
    import os, torch
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy
    import lightning_rft as rft
    from tests.processes import MODEL
    from tests.trainer_and_data import quiet_trainer, stored_data

    module = rft.RFTModule(os.environ[MODEL], optimizer=lambda parameters: torch.optim.{optimizer}, {module})
    logged = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch.last:
                wanted = ("rft/loss", "rft/reward", "rft/entropy", "rft/kl", "rft/staleness_max", "rft/reward_std")
                wanted += ("rft/grad_norm",)
                logged.append([float(trainer.callback_metrics[name]) for name in wanted])

    trainer = quiet_trainer(
        os.getcwd(), Note(), devices={devices}, strategy={strategy}, max_epochs=1,
        accumulate_grad_batches={accumulate}, gradient_clip_val=0.5, precision="{precision}",
    )
    trainer.fit(module, stored_data("{buffer}", tasks_per_step=3))
    weights = dict(module.weights())
    module.save_pretrained("saved")
    if trainer.global_rank == 0:
        torch.save((weights, torch.tensor(logged)), "{result}")
"""


def write_buffer(folder: Path, rewards: list[list[float]], turns: int = 1) -> Path:
    """A buffer with a group of samples, of some turns each, for each list of rewards."""
    from lightning_rft.buffer.ledger import Ledger
    from lightning_rft.experience import Experience, Group, GroupKey, Turn

    path = folder / "old.sqlite"
    with Ledger.open(path) as ledger:
        ledger.begin()
        for number, scores in enumerate(rewards):
            key = GroupKey(number // 3, number % 3)
            ledger.issue(key, str(number), epoch=0, explorer=0)
            length = 3 + 2 * number
            turn = Turn((4, 5, 6 + number), tuple(range(7, 7 + length)), (-3.0,) * length, (0,) * length, "stop")
            experiences = [Experience(str(number), i, (turn,) * turns, reward) for i, reward in enumerate(scores)]
            ledger.ready(Group(key, str(number), tuple(experiences)))
    return path


# Seven groups, of which one without signal: in batches of 3, 3 and 1, some ranks have nothing to do.
REWARDS = [[0.0, 1.0, 0.5, float(number)] for number in range(6)] + [[0.0] * 4]


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    return write_buffer(tmp_path, REWARDS)


@pytest.mark.parametrize(
    ("accumulate", "module"),
    [
        (1, ""),
        (2, ""),
        # the ratios are of samples whose turns lie in several micro-batches, and a reference model is asked
        (1, "max_tokens_per_micro_batch=25, objective=rft.GSPO(kl=rft.KL(0.1), correction=None)"),
        (1, "max_tokens_per_micro_batch=25, objective=rft.RLOO(kl=rft.KL(0.1, 'k1', 'reward'))"),
    ],
    ids=["whole", "two parts", "micro-batches", "micro-batches, rewards"],
)
@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED])
def test_two_ranks_train_what_one_does(
    strategy: str, accumulate: int, module: str, start: Start, start_ranks: StartRanks, tmp_path: Path
) -> None:
    (one, logged_one), (two, logged_two) = on_one_and_two(
        write_buffer(tmp_path, REWARDS, turns=2 if module else 1), start, start_ranks, tmp_path,
        strategy=strategy, accumulate=accumulate, module=module, optimizer="SGD(parameters, lr=1.0)",
        precision="32-true",
    )  # fmt: skip
    assert one.keys() == two.keys()
    # penalties in the reward are sums of log-probs, with their rounding, of which the last batch is made alone
    rounding = 1e-5 if "reward" in module else 1e-6
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-5, atol=rounding), name
    assert torch.allclose(logged_one, logged_two, rtol=1e-5, atol=rounding, equal_nan=True)
    assert not torch.equal(logged_one[0], logged_one[1]), "nothing was trained"


# few tokens are near a border of its clipping range, across which rounding would move them
SMOOTH = "objective=rft.GRPO(surrogate=rft.Clip(dual=None), correction=None, normalisation='token')"


@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED])
def test_fused_and_clipped_in_bfloat16(
    strategy: str, buffer: Path, start: Start, start_ranks: StartRanks, tmp_path: Path
) -> None:
    (one, logged_one), (two, logged_two) = on_one_and_two(
        buffer, start, start_ranks, tmp_path,
        strategy=strategy, accumulate=1, module=SMOOTH, optimizer="AdamW(parameters, lr=1e-4, fused=True)",
        precision="bf16-mixed",
    )  # fmt: skip
    assert torch.allclose(logged_one[:2], logged_two[:2], rtol=0.05, atol=1e-3)
    gaps = torch.cat([(one[name] - two[name]).abs().reshape(-1) for name in one])
    assert gaps.mean() < 5e-5, "half a step, where a step of the other sign is two"


def on_one_and_two(
    buffer: Path, start: Start, start_ranks: StartRanks, tmp_path: Path, *, strategy: str, **settings: Any
) -> list[Any]:
    """Weights and logged values of the same training on one rank and on two, at the same time."""
    results = [tmp_path / "one.pt", tmp_path / "two.pt"]
    one, two = (
        TRAIN.format(buffer=buffer, devices=devices, strategy=parallel, result=result, **settings)
        for devices, parallel, result in zip((1, 2), ("'auto'", strategy), results, strict=True)
    )
    for script in [start(one), *start_ranks(two)]:
        assert script.wait() == 0, script.stderr
    return [torch.load(result) for result in results]


@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED])
def test_both_ranks_skip_what_is_not_finite_on_one(strategy: str, start_ranks: StartRanks, tmp_path: Path) -> None:
    """Unscaled, an advantage of 1e300 is beyond float32; one rank has that group, the other an ordinary one."""
    path = write_buffer(tmp_path, [[0.0, 1.0]] * 3 + [[0.0, 1e300]] + [[0.0, 1.0]] * 2)
    scripts = start_ranks(f"""
        import os, torch
        import lightning as L
        from lightning.pytorch.strategies import ModelParallelStrategy
        import lightning_rft as rft
        from tests.processes import MODEL
        from tests.trainer_and_data import quiet_trainer, stored_data

        class Note(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                weights = torch.cat([tensor.reshape(-1) for _, tensor in pl_module.weights()])
                print(float(trainer.callback_metrics["rft/skipped_steps"]), float(weights.double().sum()))

        data = stored_data(rft.Buffer("{path}", shuffle=False), tasks_per_step=2)
        trainer = quiet_trainer(os.getcwd(), Note(), devices=2, strategy={strategy}, max_epochs=1)
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
        objective = rft.GRPO(advantage=rft.GroupRelative(scale=None))
        trainer.fit(rft.RFTModule(os.environ[MODEL], objective, optimizer), data)
    """)
    for script in scripts:
        assert script.wait() == 0, script.stderr
    assert scripts[0].stdout == scripts[1].stdout
    lines = [line.split() for line in scripts[0].stdout.splitlines()]
    assert [skipped for skipped, _ in lines] == ["0.0", "1.0", "1.0"]
    assert lines[0][1] == lines[1][1] != lines[2][1]


@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED])
def test_what_explorers_get_is_what_the_ranks_have(strategy: str, start_ranks: StartRanks) -> None:
    """On-policy, sampled and trained log-probs agree in every step: whatever was pushed is the whole new policy."""
    scripts = start_ranks(f"""
        import torch
        from lightning.pytorch.strategies import ModelParallelStrategy
        import lightning as L
        import lightning_rft as rft
        from tests.processes import fit

        kl = []
        class Module(rft.RFTModule):
            def __init__(self, model):
                super().__init__(model, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
            def on_train_batch_end(self, *_):
                kl.append(float(self.trainer.callback_metrics["rft/kl"]))

        fit(Module, engine=rft.TransformersEngine(dtype="float32", device="cpu"), devices=2, parallel={strategy},
            samples_per_task=4, tasks_per_step=3, max_new_tokens=16, tasks=[f"{{i}} =" for i in range(12)],
            reward=lambda completion, task: float(sum(map(ord, completion)) % 7))
        print(len(kl), max(kl))
    """)
    for script in scripts:
        assert script.wait() == 0, script.stderr
        steps, kl = script.stdout.split()
        assert steps == "4"
        assert float(kl) < 1e-8


# How it ends

WAITS = """
    from tests.processes import LightEngine, fit, touch
    class Engine(LightEngine):
        def step(self):
            touch("explores")
            return []
    fit(engine=Engine(), devices=2, parallel="ddp")
"""
TRAINS = """
    import time
    from lightning_rft import RFTModule
    from tests.processes import fit, touch
    class Module(RFTModule):
        def training_step(self, batch, batch_idx):
            touch("trains")
            time.sleep(0.1)
            return super().training_step(batch, batch_idx)
    fit(Module, devices=2, parallel="ddp", tasks=[f"{i} =" for i in range(1000)])
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("source", [WAITS, TRAINS], ids=["while it waits", "while it trains"])
def test_a_signal_to_one_rank_ends_all(source: str, number: signal.Signals, rank: int, start_ranks: StartRanks) -> None:
    scripts = start_ranks(source)
    scripts[0].wait_for("explores" if source == WAITS else "trains")
    if source == TRAINS:
        scripts[1].wait_for("trains")
    scripts[rank].signal(number)
    statuses = [script.wait(10) for script in scripts]
    assert 0 not in statuses
    for script in scripts:
        script.gone()
    if number == signal.SIGTERM:
        assert statuses[rank] == 143


def test_rank_0s_error_is_shown_by_all(start_ranks: StartRanks) -> None:
    scripts = start_ranks("""
        import lightning_rft as rft
        from tests.processes import fit
        def reward(completion, task):
            raise LookupError("no such answer")  # the line that is to blame
        fit(reward=reward, devices=2, parallel="ddp", tolerance=rft.Tolerance(retries=0))
    """)
    for script in scripts:
        assert script.wait() == 1
        assert "LookupError: no such answer" in script.stderr
        assert "the line that is to blame" in script.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_in_a_step_is_shown_by_all(rank: int, start_ranks: StartRanks) -> None:
    scripts = start_ranks(f"""
        from lightning_rft import RFTModule
        from tests.processes import fit
        class Module(RFTModule):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1 and self.global_rank == {rank}:
                    raise ZeroDivisionError("in the second step")  # the line that is to blame
                return super().training_step(batch, batch_idx)
        fit(Module, devices=2, parallel="ddp")
    """)
    assert 0 not in [script.wait() for script in scripts]
    assert "ZeroDivisionError: in the second step" in scripts[rank].stderr
    other = scripts[1 - rank]
    assert "the line that is to blame" in other.stderr


def test_settings_that_rank_0_refuses_are_refused_by_all(start_ranks: StartRanks) -> None:
    scripts = start_ranks("""
        from tests.processes import fit
        fit(devices=2, parallel="ddp", max_new_tokens=100_000)
    """)
    for script in scripts:
        assert script.wait() == 1
        assert "max_new_tokens=100000" in script.stderr.splitlines()[-1]


def test_settings_of_a_node_that_differ_from_the_firsts_are_refused(start_ranks: StartRanks) -> None:
    scripts = start_ranks("""
        import os
        from tests.processes import fit
        precision = ["32-true", "bf16-mixed"][int(os.environ["LOCAL_RANK"])]
        fit(devices=2, parallel="ddp", trainer_settings={"precision": precision})
    """)
    for script in scripts:
        assert script.wait(60) == 1
        assert "precision=bf16-mixed where rank 0 has 32-true: start the same command" in script.stderr
        script.gone()


def test_tensor_parallelism_is_refused(start_ranks: StartRanks) -> None:
    scripts = start_ranks("""
        from lightning.pytorch.strategies import ModelParallelStrategy
        from tests.processes import fit
        fit(devices=2, parallel=ModelParallelStrategy(tensor_parallel_size=2))
    """)
    for script in scripts:
        assert script.wait() == 1
        assert "set data_parallel_size to the number of devices and tensor_parallel_size=1" in script.stderr
