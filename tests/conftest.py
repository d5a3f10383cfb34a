"""What the tests share: running a script as a user does, and getting hold of its functions."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # so that two runs compute alike, to the last bit
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all tests are of what a CPU does
ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TINY = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 16, "batch_size": 4, "max_iters": 0,
        "eval_interval": 5, "max_new_tokens": 5, "dtype": "float32", "save": ""}
GPT_ONLY = {"n_embd", "n_head", "n_layer", "dropout", "part", "muon_lr", "momentum",
            "weight_decay", "dtype", "save", "load"}


def options(script, numbers):
    """The command line for these numbers, without those that only gpt.py knows for bigram.py."""
    return [f"--{name}={value}" for name, value in numbers.items()
            if "bigram" not in Path(script).name or name not in GPT_ONLY]


def run(script, *args, cwd, tiny=True, env=None, **kwargs):
    """Run a script as a user does, by default with tiny numbers; return the finished process."""
    numbers = options(script, TINY) if tiny else []
    return subprocess.run([sys.executable, str(script), *numbers, *args], cwd=cwd, text=True,
                          encoding="utf-8", capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **kwargs)


def as_command(script, args, folder):
    """Run a script in this process as its own command would, its output in files out and err."""
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
        flags = os.O_RDONLY if number == 0 else os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        os.dup2(os.open(name, flags), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))
    sys.modules["matplotlib"] = None  # no picture: it would take longer than all the rest
    sys.argv = [str(script), *map(str, args)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(str(script), run_name="__main__")


class Quick:
    """A run of a script in a fork of a process that has imported torch: many cost little.

    A signal to its pid hits the run as it would any command; end() waits, and tells.
    """

    server = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None

    def __init__(self, script, *args, cwd, tiny=True):
        if not self.server:
            pytest.skip("needs os.fork")
        self.server.set_forkserver_preload(["torch._dynamo", "requests", "conftest"])
        args = [*(options(script, TINY) if tiny else []), *args]
        self.folder = Path(cwd)
        self.process = self.server.Process(target=as_command, args=(script, args, cwd))
        self.process.start()
        self.pid = self.process.pid

    def end(self, timeout=120):
        """Wait for the end; return self, with status (negative: a signal), stdout and stderr."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.status = self.process.exitcode
        self.stdout, self.stderr = (
            (self.folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        for name in ("out", "err"):
            (self.folder / name).unlink()
        return self


def names(script, folder, **numbers):
    """Run a script in this process, in a folder; return its globals: functions, model and all.

    Unless numbers says otherwise, it learns from the first 20,000 characters.
    """
    argv, stdout, here = sys.argv, sys.stdout, os.getcwd()
    handlers = {kind: signal.getsignal(kind)
                for kind in {signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT)}}
    path, small = str(ROOT / script), Path(folder, "small.txt")
    if "text_file" not in numbers:
        small.write_text(TEXT[:20000], encoding="utf-8")
        numbers["text_file"] = small
    sys.argv = [path, *options(script, {**TINY, **numbers})]
    os.chdir(folder)
    try:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        # The functions' own globals, and not the copy of them that run_path returns.
        return runpy.run_path(path, run_name="__main__")["encode"].__globals__
    finally:
        sys.argv, sys.stdout = argv, stdout
        os.chdir(here)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    """The path of a short piece of the real text, for runs that should be quick."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(TEXT[:20000], encoding="utf-8")
    return path
