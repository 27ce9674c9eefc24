"""Runs scripts in forks of itself: real processes with real exit statuses, that need not import torch each by itself.

Reads a JSON object a line. ``{"script", "folder", "environment", "vllm"}`` starts one and answers its process id,
``{"poll"}`` answers the exit status of one, or null as long as it runs. In forks where ``vllm`` is false it is not
installed; with the argument ``vllm`` it is imported before them all.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from importlib.machinery import PathFinder


def preload(vllm: bool) -> None:
    """Imports all that a run needs, and vLLM if that is asked for."""
    import torch
    import transformers

    import lightning_rft

    if vllm:
        lightning_rft.VLLMEngine().prepare()
    else:
        torch.set_num_threads(1)
    for name in lightning_rft.__all__:
        getattr(lightning_rft, name)
    for name in ("AutoTokenizer", "AutoModelForCausalLM", "LlamaForCausalLM"):
        getattr(transformers, name)


def serve() -> str | None:
    """Answers until the input ends; in a fork it returns the script to run."""
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(**asked)
                return str(asked["script"])
        print(json.dumps(answer), flush=True)
    return None


def become(script: str, folder: str, environment: dict[str, str], vllm: bool) -> None:
    """Makes this fork look as if it had been started as a command, where vLLM is installed or is not."""
    find_spec = PathFinder.find_spec
    if not vllm:
        PathFinder.find_spec = staticmethod(  # type: ignore[method-assign]
            lambda name, *rest: None if name.split(".")[0] == "vllm" else find_spec(name, *rest)
        )
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [script]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name in enumerate(("/dev/null", "stdout", "stderr")):
        opened = os.open(name, flags if number else os.O_RDONLY, 0o600)
        os.dup2(opened, number)
        os.close(opened)


if __name__ == "__main__":
    preload(vllm="vllm" in sys.argv)
    gc.collect()
    gc.freeze()  # or each fork would search, and so copy, all of this when it ends, which takes longer than most runs
    to_run = serve()
    if to_run is None:
        os._exit(0)  # to end all that was imported would take seconds
    runpy.run_path(to_run, run_name="__main__")
