"""Public helpers for tests: of this package, of strategies and engines that others write, and of user code."""

from __future__ import annotations

import heapq
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey
from lightning_rft.sync.schedule import Action, Drop, Issue, Lease, Load, Publish, Rule, Schedule

__all__ = ["Event", "check_events", "check_strategy", "drive", "tiny_model"]

_PAD, _EOS, _UNK = "<|pad|>", "<|end|>", "<|unk|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 128,
    tie_word_embeddings: bool = True,
    architecture: str = "llama",
) -> Path:
    """Writes a tiny random causal LM (fp32, about 0.1 million weights) and a character tokenizer to a folder.

    transformers and vLLM load it from there without a network. Every id of the vocabulary decodes, all printable
    ASCII text encodes, one token a character, and there is a chat template. The global random state is untouched.

    Args:
        path: Folder to write to; made where missing.
        seed: Of the weights.
        vocab_size: Of model and tokenizer, at least 102.
        tie_word_embeddings: Whether input and output embeddings are one tensor.
        architecture: ``"llama"``, ``"qwen2"`` or ``"qwen3"``.

    Returns:
        The folder.

    Raises:
        ConfigurationError: Unknown architecture, or a vocabulary too small for ASCII.

    Example::

        path = tiny_model(tmp_path / "model")
        module = RFTModule(model=str(path), objective=GRPO())
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ConfigurationError(f"tiny_model(architecture={architecture!r}): choose llama, qwen2 or qwen3.")
    tokenizer = _character_tokenizer(vocab_size)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM's CPU attention takes only multiples of 32
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        # The usual 0.02 at this width gives nearly uniform outputs, in which an error hides.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = Path(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _character_tokenizer(vocab_size: int) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token per character, and special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (_PAD, _EOS, _UNK, *_ROLES)
    ascii_text = [char for char in string.printable if char.isprintable()] + ["\n"]
    spare = vocab_size - len(special) - len(ascii_text)
    if spare < 0:
        raise ConfigurationError(
            f"tiny_model(vocab_size={vocab_size}): needs at least {vocab_size - spare}, for ASCII and special tokens."
        )
    # Spelled and split as byte-level BPE does it ("Ġ" is a space), since AutoTokenizer puts a class of its own, which
    # assumes that, in the place of ours when the model is a qwen2.
    letters = ["Ġ" if char == " " else "Ċ" if char == "\n" else char for char in ascii_text]
    tokens = [*special, *letters, *(chr(0x4E00 + index) for index in range(spare))]
    # Byte-pair encoding without merges is a character model.
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token=_UNK)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Event:
    """Something that happened under :func:`drive`.

    Args:
        time: Seconds on the fake clock.
        what: ``"issued"``, ``"ready"``, ``"failed"`` or ``"dropped"`` (a group), ``"joined"``, ``"loading"``,
            ``"loaded"`` or ``"died"`` (an explorer), ``"training"`` or ``"trained"`` (a batch: its step begins or
            ends), ``"pushed"`` (a version, now loaded by every explorer or, if pushes happen in the background, about
            to be).
        version: The version that it happened with. For a group: the one that its explorer had loaded when it began;
            for ``"trained"``: the batch, which is the version that it is trained by.
        group: The group, if it is about one.
        explorer: The explorer, if it is about one.
        groups: Those of the batch that is trained.
    """

    time: float
    what: str
    version: int
    group: GroupKey | None = None
    explorer: int | None = None
    groups: tuple[GroupKey, ...] = ()


def drive(
    rule: Rule,
    *,
    batches: int,
    groups_per_batch: int | Callable[[int], int] = 1,
    explorers: int = 1,
    duration: Callable[[GroupKey, int], float] = lambda group, attempt: 1.0,
    train_time: float = 1.0,
    push_time: float = 0.0,
    fails: Callable[[GroupKey, int], bool] = lambda group, attempt: False,
    deaths: Sequence[tuple[float, int]] = (),
    joins: Sequence[tuple[float, int]] = (),
    capacity: int | None = None,
    room: int | None = None,
) -> list[Event]:
    """Runs the real schedule of a strategy with a fake clock: no process, no tensor, no waiting.

    Explorers answer all groups that they are given at once, as an engine with room does. The trainer does what
    :class:`~lightning_rft.sync.strategy.SyncStrategy` does: it waits for a batch, trains it and, where a push is due,
    waits until that may happen, or leaves it to the background.

    Args:
        rule: The strategy, or any other :class:`~lightning_rft.sync.schedule.Rule`.
        batches: Batches to train.
        groups_per_batch: Groups of every batch, or a function of the batch.
        explorers: Number of explorers, 0 and up, that are there from the start.
        duration: Seconds to explore a group, at the first, second, ... attempt (counted from 0).
        train_time: Seconds to train a batch.
        push_time: Seconds to push a version, and for an explorer that loads by itself to load it.
        fails: Whether that attempt at a group ends in an error instead of experience.
        deaths: When which explorer dies; moot for one that is not there.
        joins: When which explorer comes, or comes back; moot for one that is there.
        capacity: Most groups that may be issued and not yet trained.
        room: Most groups that one explorer works on at the same time.

    Returns:
        What happened, in order.

    Raises:
        ScheduleError: Nothing can happen any more, and not every batch was trained: a deadlock.

    Example:
        >>> from lightning_rft import Synchronous
        >>> events = drive(Synchronous(sync_interval=2), batches=2, push_time=0.5)
        >>> [(event.time, event.what, event.version) for event in events if event.what in ("pushed", "trained")]
        [(0.5, 'pushed', 0), (2.5, 'trained', 0), (3.5, 'trained', 1), (4.0, 'pushed', 2)]
    """
    size = groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch
    schedule = Schedule(rule, size=size, stop=batches, capacity=capacity)
    events: list[Event] = []
    agenda: list[tuple[float, int, Callable[[], None]]] = []
    order = count()
    now = 0.0
    loaded: dict[int, int] = {}  # explorer -> version
    attempts: Counter[GroupKey] = Counter()
    running: dict[GroupKey, tuple[int, int, int]] = {}  # group -> explorer, attempt, version
    lives: Counter[int] = Counter()  # explorer -> how often it came: what an earlier life was at is moot
    background: list[int] = []  # versions that are on their way to be loadable

    def after(seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(agenda, (now + seconds, next(order), happen))

    def note(what: str, version: int, group: GroupKey | None = None, explorer: int | None = None) -> None:
        events.append(Event(now, what, version, group, explorer))

    def carry_out(actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Issue):
                group, attempt = action.group, attempts[action.group]
                attempts[group] += 1
                running[group] = (action.explorer, attempt, loaded[action.explorer])
                note("issued", loaded[action.explorer], group, action.explorer)
                after(duration(group, attempt), partial(finish, group, attempt))
            elif isinstance(action, Lease):
                events.append(Event(now, "training", action.batch, groups=action.groups))
                after(train_time, partial(train, action))
            elif isinstance(action, Publish):
                publish(action.version)
            elif isinstance(action, Load):
                note("loading", action.version, explorer=action.explorer)
                after(push_time, partial(load_newest, action.explorer, lives[action.explorer]))
            elif isinstance(action, Drop):
                note("dropped", running.pop(action.group, (0, 0, -1))[2], action.group, action.explorer)

    def finish(group: GroupKey, attempt: int) -> None:
        if group not in running or running[group][1] != attempt:
            return  # its explorer died, or it was dropped
        explorer, _, version = running.pop(group)
        failed = fails(group, attempt)
        note("failed" if failed else "ready", version, group, explorer)
        carry_out(schedule.failed(group) if failed else schedule.ready(group, version))

    def train(lease: Lease) -> None:
        events.append(Event(now, "trained", lease.batch, groups=lease.groups))
        carry_out(schedule.trained(lease.batch))
        if not schedule.push_pending:
            go_on()

    def go_on() -> None:
        if schedule.version < batches:
            carry_out(schedule.wanted(schedule.version))
        elif max([schedule.published_version, *background]) < batches:
            publish(batches)

    def publish(version: int) -> None:
        if rule.asynchronous:
            background.append(version)
            after(push_time, partial(pushed, version))
        else:
            after(push_time, partial(push, version))

    def pushed(version: int) -> None:
        background.remove(version)
        if version > schedule.published_version:
            note("pushed", version)
            carry_out(schedule.published(version))

    def push(version: int) -> None:
        for explorer in sorted(loaded):
            load(explorer, version)
        note("pushed", version)
        carry_out(schedule.published(version))
        go_on()

    def load_newest(explorer: int, life: int) -> None:
        if explorer in loaded and lives[explorer] == life:
            load(explorer, schedule.published_version)

    def load(explorer: int, version: int) -> None:
        if loaded.get(explorer, version) < version:
            loaded[explorer] = version
            note("loaded", version, explorer=explorer)
            carry_out(schedule.loaded(explorer, version))

    def join(explorer: int) -> None:
        if explorer not in loaded:
            loaded[explorer] = -1
            lives[explorer] += 1
            note("joined", -1, explorer=explorer)
            carry_out(schedule.joined(explorer, room))

    def die(explorer: int) -> None:
        if explorer in loaded:
            note("died", loaded.pop(explorer), explorer=explorer)
            for group in [group for group, work in running.items() if work[0] == explorer]:
                del running[group]
            carry_out(schedule.died(explorer))

    for explorer in range(explorers):
        join(explorer)
    for when, explorer in deaths:
        after(when, partial(die, explorer))
    for when, explorer in joins:
        after(when, partial(join, explorer))
    publish(0)
    if rule.asynchronous:
        go_on()
    while schedule.published_version < batches:
        if not agenda:
            raise ScheduleError(
                f"deadlock: {schedule.version} of {batches} batches are trained, version {schedule.published_version} "
                f"was pushed last, and nothing can happen any more; explorers have loaded {loaded}"
            )
        now, _, happen = heapq.heappop(agenda)
        happen()
    return events


def check_events(
    rule: Rule, events: Sequence[Event], *, batches: int, groups_per_batch: int | Callable[[int], int] = 1
) -> None:
    """Checks what happened under :func:`drive` against the rules that hold for every strategy.

    Every batch is trained once and in order, with as many groups as it has; every group is trained once; no group
    began with weights older than ``admit``; nothing is staler than ``max_staleness``, nor from the future; versions are
    pushed in order, the last one included; strategies that train in order do so; nothing is dropped unless
    ``overdue="drop"``; explorers load between groups unless ``in_flight``, and one after another if ``staggered``.

    Raises:
        ScheduleError: A rule is broken; the message says which, and where.
    """

    def must(holds: bool, what: str, event: Event) -> None:
        if not holds:
            raise ScheduleError(f"{type(rule).__name__}: {what}: {event}")

    size = groups_per_batch if callable(groups_per_batch) else lambda batch: groups_per_batch
    version_of: dict[GroupKey, int] = {}
    trained: list[GroupKey] = []
    loading: set[int] = set()
    working: dict[GroupKey, int] = {}
    steps, pushed = 0, -1
    for event in events:
        if event.group is not None and event.explorer is not None:
            if event.what == "issued":
                must(event.explorer not in loading, "was given to an explorer that loads", event)
                working[event.group] = event.explorer
            else:
                working.pop(event.group)
        if event.group is not None and event.what == "issued":
            must(event.version >= rule.admit(event.group.batch), "began with weights older than admitted", event)
        if event.group is not None and event.what == "ready":
            version_of[event.group] = event.version
        if event.what == "dropped":
            must(rule.overdue == "drop", "dropped, though a step is to wait", event)
        if event.what == "training":
            must(event.version == steps, f"trained instead of batch {steps}", event)
            must(len(event.groups) == size(event.version), f"not the {size(event.version)} groups of the batch", event)
            for group in event.groups:
                age = event.version - version_of.get(group, event.version + 1)
                must(age >= 0, f"{group} was never explored, or with weights from the future", event)
                must(age <= rule.max_staleness, f"{group} is {age} batches old", event)
                must(rule.asynchronous or group.batch == event.version, f"{group} is of another batch", event)
            trained += event.groups
            steps += 1
        if event.what == "pushed":
            must(event.version > pushed, f"pushed after {pushed}", event)
            must(event.version <= steps, "pushed before it was trained", event)
            pushed = event.version
        if event.explorer is not None and event.what == "loading":
            must(not (rule.staggered and loading), f"loads while {sorted(loading)} does", event)
            must(rule.in_flight or event.explorer not in working.values(), "loads while it works", event)
            loading.add(event.explorer)
        elif event.explorer is not None and event.what in ("loaded", "died"):
            loading.discard(event.explorer)
            if event.what == "died":
                working = {group: explorer for group, explorer in working.items() if explorer != event.explorer}
    last = events[-1]
    must(steps == batches and pushed == batches, f"ended after {steps} batches, with {pushed} pushed", last)
    expected = [GroupKey(batch, slot) for batch in range(batches) for slot in range(size(batch))]
    must(sorted(trained) == expected, "some group was lost, or trained twice", last)


def check_strategy(rule: Rule, *, runs: int = 200, seed: int = 0) -> None:
    """The conformance test of a strategy: runs its schedule under many random circumstances and checks the rules.

    Answers take heavy-tailed times, groups fail, explorers die and come back, batches are short, room is scarce.

    Args:
        rule: The strategy.
        runs: How many circumstances.
        seed: Of those.

    Raises:
        ConfigurationError: The strategy can never work; the message has the arithmetic.
        ScheduleError: A rule is broken, or nothing can happen any more.

    Example:
        >>> from lightning_rft import OneStepOffPolicy
        >>> check_strategy(OneStepOffPolicy(sync_interval=2), runs=10)
    """
    random = Random(seed)
    for _ in range(runs):
        size = random.randint(1, 4)
        sizes = {5: random.randint(1, size)}  # a short batch somewhere
        batches = random.randint(1, 12)
        explorers = random.randint(2 if rule.staggered else 1, 3)
        lengths = Random(random.random())
        failing = random.choice([0.0, 0.2])

        def duration(group: GroupKey, attempt: int, lengths: Random = lengths) -> float:
            return lengths.paretovariate(1.2)

        def fails(group: GroupKey, attempt: int, lengths: Random = lengths, failing: float = failing) -> bool:
            return attempt < 5 and lengths.random() < failing

        def groups(batch: int, sizes: dict[int, int] = sizes, size: int = size) -> int:
            return sizes.get(batch, size)

        deaths = [(random.uniform(0, 20), random.randrange(explorers)) for _ in range(random.choice([0, 0, 2]))]
        joins = [(when + random.uniform(0, 5), explorer) for when, explorer in deaths]
        events = drive(
            rule,
            batches=batches,
            groups_per_batch=groups,
            explorers=explorers,
            duration=duration,
            train_time=random.choice([0.1, 1.0, 5.0]),
            push_time=random.choice([0.0, 0.1, 2.0]),
            fails=fails,
            deaths=deaths,
            joins=joins,
            capacity=random.choice([None, size, 2 * size]),
            room=random.choice([None, 1, 3]),
        )
        check_events(rule, events, batches=batches, groups_per_batch=groups)
