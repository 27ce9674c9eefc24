"""A traceback from another process shows the user's file and line, wherever the code is from."""

from __future__ import annotations

import functools
import importlib
import linecache
import os
import pickle
import runpy
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import lightning_rft
from lightning_rft.channel import Channel, Failure, spawn
from lightning_rft.pickling import dumps

Code = dict[str, Any]
Send = Callable[..., Any]


# Every kind of callable, each with a line that is to blame, in every place that code comes from

SOURCE = '''"""What a user writes."""
import functools

def function():
    return 1 / 0  # function

anonymous = lambda: 1 / 0  # anonymous

def logged(wrapped):
    @functools.wraps(wrapped)
    def wrapper():
        return wrapped()  # wrapper
    return wrapper

@logged
def decorated():
    return 1 / 0  # decorated

class Base:
    total = 1
    def inherited(self):
        return self.total / 0  # method
    @property
    def asked(self):
        return self.total / 0  # property

class Judge(Base):
    def __call__(self):
        return self.total / 0  # instance
    @staticmethod
    def static():
        return 1 / 0  # static method
    @classmethod
    def of_class(cls):
        return cls.total / 0  # class method

async def coroutine():
    return 1 / 0  # coroutine

def outer(total):
    def inner():
        return [total / number for number in (1, 0)]  # closure
    return inner

def partly(total):
    return total / 0  # partial

def helps():
    return function()  # caller

class Unloadable:
    def __reduce__(self):
        return rebuild, ()
    def __call__(self):
        pass

def rebuild():
    raise RuntimeError("not here")  # rebuilding
'''

CALLS: dict[str, Callable[[Code], Callable[[], object]]] = {
    "function": lambda code: code["function"],
    "anonymous": lambda code: code["anonymous"],
    "wrapper": lambda code: code["decorated"],
    "decorated": lambda code: code["decorated"],
    "method": lambda code: code["Judge"]().inherited,
    "property": lambda code: functools.partial(getattr, code["Judge"](), "asked"),
    "instance": lambda code: code["Judge"](),
    "static method": lambda code: code["Judge"].static,
    "class method": lambda code: code["Judge"].of_class,
    "coroutine": lambda code: code["coroutine"],
    "closure": lambda code: code["outer"](1),
    "partial": lambda code: functools.partial(code["partly"], 1),
    "caller": lambda code: code["helps"],
    "function it calls": lambda code: code["helps"],
    "rebuilding": lambda code: code["Unloadable"](),
}
MARKS = {"function it calls": "function"}


class Place:
    """Where code comes from.

    Args:
        folder: Where its file may be.
        importable: A folder that both processes import from.
        patch: Undoes what is done to this process.
    """

    def __init__(self, folder: Path, importable: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.importable = importable
        self.patch = patch
        self.name = str(folder / "script.py")
        self.source = True  # whether the lines can be known
        self.before_the_call: Callable[[], object] = os.getpid  # happens in the other process

    def write(self, text: str = SOURCE) -> None:
        Path(self.name).write_text(text)

    def execute(self, name: str, code: Code | None = None) -> Code:
        self.name = name
        code = {"__name__": "__main__"} if code is None else code
        exec(compile(SOURCE, name, "exec"), code)
        return code

    def register(self) -> None:
        """Tells the lines as IPython, doctest and attrs do."""
        self.patch.setitem(linecache.cache, self.name, (len(SOURCE), None, SOURCE.splitlines(True), self.name))


def script(place: Place) -> Code:
    place.write()
    return runpy.run_path(place.name, run_name="__main__")


def script_edited_after(place: Place) -> Code:
    place.before_the_call = functools.partial(Path(place.name).write_text, "# begun anew\n" * 99)
    return script(place)


def script_deleted_after(place: Place) -> Code:
    place.before_the_call = Path(place.name).unlink
    return script(place)


def script_edited_before(place: Place) -> Code:
    """Its lines were asked for when they were others."""
    place.write("# a first try\n" * 99)
    assert linecache.getline(place.name, 1) == "# a first try\n"
    return script(place)


def imported(place: Place, folder: Path) -> Code:
    place.name = str(folder / "user_code.py")
    place.write()
    place.patch.syspath_prepend(folder)
    place.patch.delitem(sys.modules, "user_code", raising=False)
    return vars(importlib.import_module("user_code"))


def module(place: Place) -> Code:
    return imported(place, place.importable)


def module_by_value(place: Place) -> Code:
    code = imported(place, place.folder)
    cloudpickle.register_pickle_by_value(sys.modules["user_code"])
    return code


def zip_file(place: Place) -> Code:
    file = Path(place.name).with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as app:
        app.writestr("__main__.py", SOURCE)
    place.name = str(file / "__main__.py")
    return runpy.run_path(str(file), run_name="__main__")


def ipython_cell(place: Place) -> Code:
    code = place.execute("<ipython-input-3-0123456789ab>")
    place.register()
    return code


def notebook_cell(place: Place) -> Code:
    code = place.execute("/tmp/ipykernel_1/23456789.py")
    place.register()
    return code


def cell_by_ipython_itself(place: Place) -> Code:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell(SOURCE, silent=True).raise_error()
    code: Code = shell.user_ns
    place.name = code["function"].__code__.co_filename
    return code


def prompt(place: Place) -> Code:
    """Python's own, since 3.13; later 3.13s keep its lines apart."""
    code = place.execute("<python-input-3>")
    if hasattr(linecache, "_getlines_from_code"):
        linecache._register_code(compile(SOURCE, place.name, "exec"), SOURCE, place.name)
    else:
        place.register()
    return code


def exec_without_source(place: Place) -> Code:
    place.source = False
    return place.execute("<string>")


def exec_under_a_made_up_name(place: Place) -> Code:
    """In a script, whose loader must not be asked for the lines."""
    place.write("# the script\n" * 99)
    script = {"__name__": "__main__", "__file__": place.name, "__loader__": SourceFileLoader("__main__", place.name)}
    place.source = False
    return place.execute("made up", script)


def loader_that_fails(place: Place) -> Code:
    class Loader:
        def get_source(self, name: str) -> str:
            raise ValueError("encrypted")

    name = str(place.folder / "nowhere.py")
    place.source = False
    return place.execute(name, {"__name__": "__main__", "__file__": name, "__loader__": Loader()})


def exec_with_source(place: Place) -> Code:
    code = place.execute("<generated by a library>")
    place.register()
    return code


PLACES = [
    *(script, script_edited_after, script_deleted_after, script_edited_before, module, module_by_value, zip_file),
    *(ipython_cell, notebook_cell, cell_by_ipython_itself, prompt),
    *(exec_with_source, exec_without_source, exec_under_a_made_up_name, loader_that_fails),
]


@pytest.fixture(scope="module")
def importable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("importable")


@pytest.fixture(scope="module")
def channel(importable: Path) -> Iterator[Channel]:
    path = os.pathsep.join([*(folder or os.getcwd() for folder in sys.path), str(importable)])
    process, channel = spawn("tests.forking_caller", environment={"PYTHONPATH": path})
    yield channel
    channel.close()
    assert process.wait(10) == 0


@pytest.fixture
def send(channel: Channel) -> Send:
    """Sends functions to another process, which has seen none before, and returns what the last one returns there."""

    def send(*calls: Callable[[], object]) -> Any:
        channel.send(calls)
        return channel.receive(30)

    return send


@pytest.fixture
def place(tmp_path: Path, importable: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    cache = dict(linecache.cache)
    yield Place(tmp_path, importable, monkeypatch)
    linecache.cache.clear()
    linecache.cache.update(cache)
    if "user_code" in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.unregister_pickle_by_value(sys.modules["user_code"])


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("where", PLACES, ids=[where.__name__ for where in PLACES])
def test_a_traceback_shows_the_users_line(send: Send, place: Place, where: Callable[[Place], Code], kind: str) -> None:
    call = CALLS[kind](where(place))
    failure = send(place.before_the_call, call)
    assert isinstance(failure, Failure), failure
    (number,) = [
        number
        for number, line in enumerate(SOURCE.splitlines(), start=1)
        if line.endswith(f"  # {MARKS.get(kind, kind)}")
    ]
    shown = failure.text.splitlines()
    at, *_ = [
        index for index, line in enumerate(shown) if line.startswith(f'  File "{place.name}", line {number}, in ')
    ]
    assert (shown[at + 1] == "    " + SOURCE.splitlines()[number - 1].strip()) == place.source, failure.text
    assert place.source or not shown[at + 1].startswith("    "), failure.text  # none rather than another's


@pytest.mark.parametrize("where", [script, ipython_cell])
def test_how_cloudpickle_sends_code_does_not_matter(
    send: Send, place: Place, monkeypatch: pytest.MonkeyPatch, where: Callable[[Place], Code]
) -> None:
    def refuse(code: types.CodeType) -> Any:
        raise NotImplementedError

    monkeypatch.setitem(cloudpickle.Pickler.dispatch_table, types.CodeType, refuse)
    function = where(place)["function"]
    with pytest.raises(NotImplementedError):
        cloudpickle.dumps(function)
    assert "return 1 / 0  # function" in send(function).text


def test_a_constant_that_is_put_into_code(send: Send, place: Place) -> None:
    code = script(place)
    function = code["function"]
    constants = tuple(code["outer"] if constant == 0 else constant for constant in function.__code__.co_consts)
    function.__code__ = function.__code__.replace(co_consts=(*constants, code["anonymous"], object))
    assert "return 1 / 0  # function" in send(function).text


def test_the_lines_of_a_file_travel_once(place: Place) -> None:
    place.write(SOURCE + "".join(f"# more, {number}\n" for number in range(1000)))
    code = runpy.run_path(place.name, run_name="__main__")
    everything = dumps([choose(code) for choose in CALLS.values()])
    assert everything.count(b"  # rebuilding\n") == everything.count(b"# more, 7\n") == 1
    assert len(dumps([code["function"], code["anonymous"]])) - len(dumps(code["function"])) < 500


def test_what_can_be_imported_travels_by_name(place: Place) -> None:
    code = module(place)
    packed = dumps([code["function"], code["Judge"]])
    assert b"1 / 0" not in packed and len(packed) < 200
    assert pickle.loads(packed) == [code["function"], code["Judge"]]


def test_functions_of_a_script_share_its_globals(place: Place) -> None:
    place.write("total = 0\ndef add():\n    global total\n    total += 1\ndef read():\n    return total\n")
    code = runpy.run_path(place.name, run_name="__main__")
    add, read = pickle.loads(dumps([code["add"], code["read"]]))
    assert (add(), add(), read()) == (None, None, 2)
    assert code["read"]() == 0


def test_an_exception_that_comes_back_leaves_the_lines_here_alone(send: Send, place: Place) -> None:
    place.write("class Unhappy(Exception):\n    def explain(self):\n        return 1 / 0  # explained\n")
    unhappy = runpy.run_path(place.name, run_name="__main__")["Unhappy"]

    def fail() -> None:
        raise unhappy("no")

    failure = send(fail)
    assert b"# explained" not in failure.exception
    error = failure.unpack("the other process")
    assert type(error) is unhappy
    with pytest.raises(ZeroDivisionError) as caught:  # cloudpickle gave the class here the methods that came back
        error.explain()
    assert "# explained" in Failure.of(caught.value).text
    place.write("# begun anew\n" * 9)
    linecache.checkcache(place.name)
    assert linecache.getline(place.name, 3) == "# begun anew\n"


def test_one_module_alone_pickles_by_value() -> None:
    package = Path(lightning_rft.__file__).parent
    users = {file.name for file in package.rglob("*.py") if "import cloudpickle" in file.read_text()}
    assert users == {"pickling.py"}
