"""What the tests share: running a script as a user does, and getting hold of its functions."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TINY = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 16, "batch_size": 4, "max_iters": 0,
        "eval_interval": 5, "max_new_tokens": 5, "dtype": "float32", "save": ""}
GPT_ONLY = {"n_embd", "n_head", "n_layer", "dtype", "save", "load", "resume",
            "dropout", "muon_lr", "weight_decay"}


def options(script, numbers):
    """The command line for these numbers, without those that only gpt.py knows for bigram.py."""
    return [f"--{name}={value}" for name, value in numbers.items()
            if "gpt" in Path(script).name or name not in GPT_ONLY]


def run(script, *args, cwd, tiny=True, env=None, **kwargs):
    """Run a script as a user does, by default with tiny numbers; return the finished process."""
    numbers = options(script, TINY) if tiny else []
    return subprocess.run([sys.executable, str(script), *numbers, *args], cwd=cwd, text=True,
                          encoding="utf-8", capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **kwargs)


def names(script, **numbers):
    """Run a script in this process with these numbers; return its globals, functions and all.

    A gpt.png may come of it in the working folder: call it with monkeypatch.chdir(tmp_path).
    """
    argv, hook, stdout = sys.argv, sys.excepthook, sys.stdout
    kernel = sys.modules.pop("ipykernel", None)  # nbclient loads it, and this is no notebook
    sys.argv = [str(script), *options(script, {**TINY, **numbers})]
    space = {"__name__": "__main__", "__file__": str(ROOT / script)}
    try:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        source = (ROOT / script).read_text(encoding="utf-8")
        exec(compile(source, str(ROOT / script), "exec"), space)
    finally:
        sys.argv, sys.excepthook, sys.stdout = argv, hook, stdout
        if kernel:
            sys.modules["ipykernel"] = kernel
    return space


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    """The path of a short piece of the real text, for runs that should be quick."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(TEXT[:20000], encoding="utf-8")
    return path
