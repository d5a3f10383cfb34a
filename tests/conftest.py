"""What the tests share: running a script as a user does, in this process or in one of its own."""
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # so that two runs compute alike, to the last bit
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all tests are of what a CPU does
ROOT = Path(__file__).resolve().parent.parent
GPT = (ROOT / "gpt.py").read_text(encoding="utf-8")
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TINY = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 16, "batch_size": 4,
        "max_iters": 10, "plain_iters": 2, "eval_interval": 5, "max_new_tokens": 5}
LOSSES = r"(?m)^step (\d+): train loss (\S+), val loss (\S+)$"


def edited(source, **numbers):
    """The source of a script with other numbers at the top."""
    for name, value in numbers.items():
        source = re.sub(rf"(?m)^{name} = .+?(?=  #|$)", f"{name} = {value!r}", source)
    return source


def words(numbers):
    """The options for these numbers."""
    return [f"--{name}={value}" for name, value in numbers.items()]


def losses(said):
    """{step: validation loss} of the run itself, as it was printed."""
    said = said[said.index(" parameters on "):] if " parameters on " in said else ""
    return {int(step): float(val) for step, _, val in re.findall(LOSSES, said)}


def play(script, folder, *args, tiny=True, stop=None, **numbers):
    """Run a script in this process: its status, what it said, its losses and its globals.

    Scripts that take no options get their numbers by editing. Without text_file, the text is
    the first 20,000 characters. stop is a function that is called with every line printed.
    """
    numbers = {**(TINY if tiny else {}), **numbers}
    source = Path(script if Path(script).exists() else ROOT / script).read_text(encoding="utf-8")
    if "text_file" not in numbers and not Path(folder, "input.txt").exists():
        Path(folder, "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    takes_options = "argparse" in source
    path = Path(folder, Path(script).name)
    path.write_text(source if takes_options else edited(source, **numbers), encoding="utf-8")

    class Out(io.StringIO):
        def write(self, line):
            if stop:
                stop(line)
            return super().write(line)

    out, err, space, status = Out(), io.StringIO(), {}, 0
    before = sys.argv, os.getcwd()
    modules = {name: sys.modules.pop(name, None) for name in ("matplotlib", "ipykernel")}
    sys.argv = [path.name, *(words(numbers) if takes_options else []), *args]
    os.chdir(folder)
    sys.modules["matplotlib"] = None  # no picture: it would take longer than all the rest
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            space = runpy.run_path(path.name, run_name="__main__")["encode"].__globals__
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        del sys.modules["matplotlib"]
        sys.modules.update({name: module for name, module in modules.items() if module})
    said = out.getvalue()
    return SimpleNamespace(status=status, out=said, err=err.getvalue(), losses=losses(said),
                           space=space, sample=said.partition("--- sample 1 of 1 ---\n")[2]
                           .partition("no picture")[0])


def play_in_32_bits(*args, **numbers):
    """The same where 16-bit numbers are not fast, to compare with an exact computation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return play(*args, **numbers)


def run(*command, cwd, **kwargs):
    """Run a command of Python as a user does; return the finished process."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, text=True,
                          encoding="utf-8", capture_output=True, timeout=300, **kwargs)


@pytest.fixture(scope="session")
def series(tmp_path_factory):
    """The folder with all steps as scripts."""
    folder = tmp_path_factory.mktemp("series")
    assert run(ROOT / "tests" / "steps.py", f"--write={folder}", cwd=folder).returncode == 0
    return folder
