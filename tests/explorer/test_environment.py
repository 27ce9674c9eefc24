"""``Environment``: one workflow for the shapes of Gymnasium, OpenEnv, TextArena and TRL, which ends on every path."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError, ContextFull, DeadlineError
from lightning_rft.experience import Task
from lightning_rft.explorer.workflows.environments import Environment
from lightning_rft.explorer.workflows.shapes import describe, reset_arguments, step_of, task_seed
from lightning_rft.pickling import dumps
from lightning_rft.scores import Answer
from tests.explorer.scripted import TEMPLATE_WITH_TOOLS, Script, scripted_policy
from tests.explorer.test_tools import call


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = TEMPLATE_WITH_TOOLS
    return tokenizer


@pytest.fixture
def run(tokenizer: Any) -> Callable[..., tuple[Answer, list[str], Any]]:
    def run(environment: Environment, answers: Any, task: Task | None = None, **settings: Any) -> Any:
        script = Script(tokenizer, answers)
        policy = scripted_policy(tokenizer, script, **settings)
        answer = asyncio.run(environment(task or Task("Go.", id="7"), policy))
        assert policy.drift == 0
        assert [turn.parent for turn in policy.turns] == [None, *range(len(policy.turns) - 1)]
        if answer.reward is not None:  # the explorer adds the rewards of turns
            answer = replace(answer, reward=answer.reward + sum(turn.reward or 0.0 for turn in policy.turns))
        return answer, script.prompts, policy

    return run


class Count:
    """Counts to a goal, in the shape of Gymnasium; keeps what was done to it."""

    made: list[Count]

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.closed = 0
        self.database = sqlite3.connect(":memory:")  # refuses another thread
        self.made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.seen += [seed, options]
        self.left = 3
        return "3 left", {}

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.database.execute("SELECT 1")
        self.left -= action
        return f"{self.left} left", 0.25 * action, self.left <= 0, False, {}

    def close(self) -> None:
        self.database.close()
        self.closed += 1


@pytest.fixture(autouse=True)
def no_environment_stays_open() -> Any:
    Count.made = []
    yield
    assert [one.closed for one in Count.made] == [1] * len(Count.made)


def test_gymnasium(run: Any) -> None:
    task = Task(
        [{"role": "user", "content": [{"type": "text", "text": "Go."}]}], metadata={"seed": 5, "options": {"x": 1}}
    )
    answer, prompts, policy = run(Environment(Count, action=int), ["1", "two", " 2"], task)
    assert Count.made[0].seen == [5, {"x": 1}]
    assert prompts[0] == "<|user|>Go.\n\n3 left<|end|><|assistant|>"
    assert prompts[1] == f"{prompts[0]}1<|end|><|user|>2 left<|end|><|assistant|>"
    assert prompts[2].startswith(f"{prompts[1]}two<|end|><|user|>Error: ValueError: invalid literal for int()")
    assert (answer.text, answer.reward, answer.metrics) == (" 2", 0.75, {"steps": 2, "invalid_actions": 1})
    assert [turn.reward for turn in policy.turns] == [0.25, 0.0, 0.5]


def test_one_that_never_ends_is_left_with_what_it_has_earned(run: Any) -> None:
    answer, prompts, _ = run(Environment(Count, max_turns=4, action=int), lambda _: "0")
    assert len(prompts) == 4 and (answer.reward, answer.metrics["steps"]) == (0.0, 4)
    answer, prompts, _ = run(Environment(Count, action=int), lambda _: "0", max_model_len=250)  # until it is full
    assert len(prompts) > 4 and answer.metrics["steps"] == len(prompts)
    with pytest.raises(ContextFull):
        run(Environment(Count, action=int), [], max_model_len=101)


@pytest.mark.parametrize("where", ["factory", "reset", "step", "close"])
def test_one_that_hangs_fails_its_sample_and_is_closed(run: Any, where: str) -> None:
    freed = threading.Event()

    class Hangs(Count):
        def reset(self, **settings: Any) -> Any:
            return freed.wait() if where == "reset" else super().reset()

        def step(self, action: int) -> Any:
            return freed.wait() if where == "step" else super().step(action)

        def close(self) -> None:
            if where == "close":
                freed.wait()
            self.closed += 1  # called on another thread than that which hangs
            self.database = None  # type: ignore[assignment]

    def make() -> Count:
        if where == "factory":
            freed.wait()
        return Hangs()

    began = time.monotonic()
    try:
        if where == "close":  # of a sample that is whole
            assert run(Environment(make, timeout_s=0.5, action=int), ["3"])[0].reward == 0.75
        else:
            with pytest.raises(DeadlineError, match=rf"environment's {where}\(\) took longer than .*timeout_s=0.5"):
                run(Environment(make, timeout_s=0.5, action=int), ["3"])
        assert time.monotonic() - began < 10
        assert [one.closed for one in Count.made] == {"factory": [], "close": [0]}.get(where, [1])  # while it hangs
    finally:
        freed.set()
    while not Count.made or any(not one.closed for one in Count.made):  # by a thread that was waiting, or makes one yet
        assert time.monotonic() - began < 20


def test_a_sample_that_is_cut_short_closes_its_environment(tokenizer: Any) -> None:
    async def cut() -> None:
        waits = asyncio.Event()

        async def sample(request: Any) -> Any:
            waits.set()
            await asyncio.sleep(1000)

        policy = scripted_policy(tokenizer, sample)  # type: ignore[arg-type]
        running = asyncio.create_task(Environment(Count)(Task("Go."), policy))
        await waits.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cut())
    assert Count.made


@pytest.mark.parametrize("where", ["reset", "step", "observe", "shape"])
def test_an_error_of_the_environment_is_the_samples(run: Any, where: str) -> None:
    class Fails(Count):
        def reset(self) -> Any:  # type: ignore[override]
            return 1 / 0 if where == "reset" else None

        def step(self, action: str) -> Any:  # type: ignore[override]
            return 1 / 0 if where == "step" else ("?" if where == "shape" else (None, 0, False, False, {}))

    def observe(seen: Any) -> Any:
        return "" if where != "observe" else 1 / 0

    expected = ConfigurationError if where == "shape" else ZeroDivisionError
    with pytest.raises(expected, match="returned str" if where == "shape" else "division"):
        run(Environment(Fails, observe=observe), ["x"])


# OpenEnv


@dataclasses.dataclass
class StepResult:
    observation: Any
    reward: float | None = None
    done: bool = False


class Client:
    """OpenEnv's client, which is ``async`` and sends all keyword arguments to the server."""

    sent: dict[str, Any]

    async def reset(self, **kwargs: Any) -> StepResult:
        type(self).sent = kwargs
        return StepResult({"question": "4+1?"})

    async def step(self, action: Any, **kwargs: Any) -> StepResult:
        return StepResult({"question": ""}, reward=float(action == {"answer": 5}), done=True)

    async def close(self) -> None:
        self.sent["closed"] = True


def test_openenv_by_its_client(run: Any) -> None:
    async def make(task: Task) -> Client:
        assert task.answer == 5
        return Client()

    environment = Environment(make, action=lambda text: {"answer": int(text)})
    answer, prompts, _ = run(environment, ["5"], Task("Add.", answer=5, metadata={"seed": 4, "level": 2}))
    assert answer.reward == 1.0 and prompts == ['<|user|>Add.\n\n{"question": "4+1?"}<|end|><|assistant|>']
    assert Client.sent == {"seed": 4, "level": 2, "closed": True}


def test_openenv_in_process(run: Any) -> None:
    class Observation(SimpleNamespace):
        def model_dump(self) -> dict[str, Any]:
            return vars(self)

    class Add:
        def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
            return Observation(question="?", done=False, reward=None, metadata={})

        def step(self, action: str, timeout_s: float | None = None, **kwargs: Any) -> Observation:
            return Observation(question="!", done=action == "b", reward=0.5, metadata={})

    answer, prompts, _ = run(Environment(Add), ["a", " b "])
    assert answer.reward == 1.0
    assert prompts[1].endswith('a<|end|><|user|>{"question": "!"}<|end|><|assistant|>')


# TextArena


class Game:
    """TextArena's shape: draws from Python's own random numbers, shows all each time, and pays at the end."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == 1
        random.seed(seed)
        time.sleep(0.001)  # so that another game would seed them meanwhile
        self.goal, self.text, self.won = random.randrange(10**6), f"[GAME] Guess {task_seed(Task('', id='7'))}.", None

    def get_observation(self) -> tuple[int, str]:
        return 0, self.text

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.text += f"\n[Player 0] {action}\n[GAME] No."
        self.won = action == "right"
        return self.won, {}

    def close(self) -> tuple[dict[int, float] | None, dict[int, Any]]:
        return ({0: 1.0} if self.won else None), {}


def test_textarena(run: Any) -> None:
    answer, prompts, policy = run(Environment(Game), ["wrong", "right"])
    assert prompts[1].endswith("wrong<|end|><|user|>[Player 0] wrong\n[GAME] No.<|end|><|assistant|>")
    assert answer.reward == 1.0 and [turn.reward for turn in policy.turns] == [0.0, 1.0]
    assert run(Environment(Game, max_turns=2), ["wrong", "wrong"])[0].reward == 0.0


def test_all_samples_of_a_task_begin_in_the_same_state(tokenizer: Any) -> None:
    games: list[Game] = []

    def make() -> Game:
        games.append(Game())
        return games[-1]

    async def group() -> None:
        environment = Environment(make, max_turns=1)
        script = Script(tokenizer, lambda _: "x")
        policies = [scripted_policy(tokenizer, script) for _ in range(16)]
        await asyncio.gather(*(environment(Task("Go.", id=str(n // 8)), one) for n, one in enumerate(policies)))

    asyncio.run(group())
    assert len({game.goal for game in games}) == 2


# TRL


class Door:
    """As TRL takes it: tools are methods, rewards are asked for at the end."""

    reward = 0.0
    done = False

    def reset(self, **kwargs: Any) -> str | None:
        self.given = kwargs
        return None if "silent" in kwargs else "A door."

    def push(self, hard: bool = False) -> str:
        """Pushes the door.

        Args:
            hard: Whether to push hard.
        """
        if self.done:
            raise ValueError("Game over.")
        if hard:
            self.reward, self.done = 1.0, self.given.get("closes", False)
        return "It opens." if hard else "It moves."

    def helper(self) -> None:  # no docstring: no tool
        pass

    def _private(self) -> None:
        """Is no tool."""


def test_trl(run: Any) -> None:
    task = Task([{"role": "system", "content": "Go in."}], answer="in", metadata={"level": 3})
    doors: list[Door] = []
    environment = Environment(lambda: doors.append(Door()) or doors[-1])  # type: ignore[func-returns-value]
    answers = [call("push") + call("push", hard=True), call("push", hard="x") + call("helper"), "I am in."]
    answer, prompts, policy = run(environment, answers, task)
    assert doors[0].given == {"prompt": task.prompt, "answer": "in", "level": 3, "seed": task_seed(task)}
    assert prompts[0].count('"name": "') == 1 and "<|user|>A door.<|end|>" in prompts[0]
    assert "<|user|>It moves.<|end|><|user|>It opens.<|end|>" in prompts[1]
    assert (answer.text, answer.reward) == ("I am in.", 1.0)
    assert answer.metrics == {"tool_calls": 4, "tool_errors": 2}
    assert policy.messages[-1]["content"] == "I am in."


def test_a_tool_environment_may_end_and_hang(run: Any) -> None:
    answer, prompts, _ = run(Environment(Door), [call("push", hard=True)], Task("Go.", metadata={"closes": True}))
    assert len(prompts) == 1 and answer.reward == 1.0

    class Hangs(Door):
        closed = 0

        async def push(self, hard: bool = False) -> str:  # type: ignore[override]
            """Hangs.

            Args:
                hard: Whether to push hard.
            """
            await asyncio.sleep(1000)
            return ""

        def close(self) -> None:
            type(self).closed += 1

    with pytest.raises(DeadlineError, match=r"environment's push\(\) took longer"):
        run(Environment(Hangs, timeout_s=0.2), [call("push"), "never"])
    assert Hangs.closed == 1


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"get_reward": lambda self: 0.5, "reward": 2.0}, (0.5, {})),
        ({"reward": lambda self: {"in": 1.0, "quick": 0.5}}, (None, {"in": 1.0, "quick": 0.5})),
        ({"reward": None}, (None, {})),
    ],
)
def test_where_the_reward_comes_from(run: Any, members: dict[str, Any], expected: Any) -> None:
    answer, *_ = run(Environment(type("Paid", (Door,), members)), ["No."])
    assert (answer.reward, answer.rewards) == expected


# What is refused


def undescribed() -> type:
    class Undescribed:
        def reset(self) -> None: ...

        def act(self, how) -> None:  # type: ignore[no-untyped-def]
            """Acts."""

    return Undescribed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Environment(undescribed()), "tool 'act': Argument how is missing a type hint"),
        (lambda: Environment(Door()), r"factory=.*must be a class or function"),
        (lambda: Environment(Count, max_turns=0), r"Environment\(max_turns=0\)"),
    ],
)
def test_what_cannot_work_is_said_at_once(make: Callable[[], Environment], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_is_no_environment(run: Any) -> None:
    with pytest.raises(ConfigurationError, match="SimpleNamespace is no environment"):
        run(Environment(SimpleNamespace), [])
    with pytest.raises(ConfigurationError, match=r"Still has neither step\(\) nor a public method with a docstring"):
        run(Environment(type("Still", (), {"reset": lambda self: None})), [])


def test_shapes() -> None:
    mapping = {"observation": "a", "reward": 1, "done": False}
    assert step_of(("a", 1, False, {})) == step_of(mapping) == ("a", 1.0, False)
    assert step_of(("a", 1, False, True)).done and not step_of(("a", 1, False, {"x": 1})).done
    assert step_of(StepResult("a")) == ("a", 0.0, False)
    assert (describe(StepResult("a")), describe(None), describe([1, {2}])) == ('{"observation": "a"}', "", '[1, "{2}"]')
    assert task_seed(Task("", id="a")) == task_seed(Task("x", id="a")) != task_seed(Task("", id="b"))

    def reset(seed: int, answer: str, level: int = 1) -> None: ...

    task = Task("", answer="x", metadata={"seed": 3, "level": 2, "other": 1})
    assert reset_arguments(reset, task, steps=True) == {"seed": 3, "answer": "x", "level": 2}
    columns = Task("", metadata={"task": "mine", "num_players": 2})
    assert reset_arguments(lambda task, num_players: None, columns, steps=True) == columns.metadata


def test_it_crosses_to_another_process() -> None:
    import pickle

    environment = pickle.loads(dumps(Environment(lambda: Game(), action=int)))
    assert environment.action("3") == 3 and isinstance(environment.factory(), Game)


# The real ones, where they are installed


def test_the_real_gymnasium(run: Any) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    made: list[Any] = []

    def make() -> Any:
        made.append(gymnasium.make("FrozenLake-v1", is_slippery=False))
        return made[-1]

    moves = iter("221222")  # a random map would be another one
    task = Task("Go.", metadata={"seed": 0})
    answer, prompts, _ = run(Environment(make, action=int), lambda _: next(moves, "0"), task)
    assert prompts[0].endswith("Go.\n\n0<|end|><|assistant|>") and answer.metrics["steps"] >= 3


def test_the_real_textarena(run: Any) -> None:
    textarena = pytest.importorskip("textarena")
    solution = ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"]
    answer, prompts, _ = run(Environment(lambda: textarena.make("TowerOfHanoi-v0")), solution, max_model_len=9000)
    assert answer.reward == 1.0 and len(prompts) == 7
    assert prompts[1].count("You are playing Tower of Hanoi") == 1
