"""Several processes, started by PyTorch's launcher, train like one."""
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import GPT, ROOT, TEXT, TINY, play, words

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs libuv there")
NUMBERS = {**TINY, "batch_size": 8, "max_iters": 8, "eval_interval": 1}


def launch(script, folder, **numbers):
    """Run a script in two processes, in a folder with a short text; return the launcher."""
    folder.mkdir(exist_ok=True)
    (folder / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={port}", str(script),
               *words({**NUMBERS, **numbers})]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_follow_one(tmp_path):
    """The same gradients, the same losses, and only one that speaks and saves."""
    source = GPT.replace("dtype = torch", "fast = False\ndtype = torch").replace(
        "nn.init.zeros_(self", "nn.init.normal_(self").replace("show_progress(step, loss) ", (
            "torch.save([p.grad for p in unwrapped.parameters()], f'grad{rank}') "))
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    (tmp_path / "one").mkdir()
    play(tmp_path / "edited.py", tmp_path / "one", **{**NUMBERS, "max_iters": 1})
    two = launch(tmp_path / "edited.py", tmp_path / "two", max_iters=1)
    assert two.returncode == 0, two.stderr
    alone = torch.load(tmp_path / "one" / "grad0")
    assert min(grad.abs().max() for grad in alone) > 1e-4
    for rank in (0, 1):
        both = torch.load(tmp_path / "two" / f"grad{rank}")
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    alone = play("gpt.py", tmp_path, **NUMBERS)
    both = launch(ROOT / "gpt.py", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    said = both.stdout[both.stdout.index(" parameters on"):]
    losses = [float(loss) for loss in re.findall(r"(?m)^step .* val loss (\S+)", said)]
    assert losses == pytest.approx(list(alone.losses.values()), abs=1e-3) and len(losses) == 9
    assert losses[8] < losses[0] - 0.05
    for line in ("distinct ones", "parameters on cpu", "--- sample 1 of 1 ---", "saved as gpt.pt"):
        assert both.stdout.count(line) == 1
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"gpt.pt", "input.txt"} <= names <= {"gpt.pt", "gpt.pt.png", "input.txt"}


def test_dropouts_differ(tmp_path):
    source = GPT.replace("loss.backward() ", (
        "torch.save(getattr(model, 'module', model).hidden, f'hidden{rank}')\n"
        "    loss.backward() "))
    source = source.replace("x = self.blocks(x) ", "self.hidden = x == 0\n        "
                            "x = self.blocks(x) ")
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    done = launch(tmp_path / "edited.py", tmp_path / "two", max_iters=1, dropout=0.5)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / "two" / f"hidden{rank}") for rank in (0, 1))
    assert first.shape == second.shape == (4, 16, 16)
    assert 0.4 < first.float().mean() < 0.6 and not torch.equal(first, second)


def test_a_batch_that_cannot_be_divided(tmp_path):
    done = launch(ROOT / "gpt.py", tmp_path / "two", batch_size=7)
    assert done.returncode != 0 and "step 0" not in done.stdout
    assert "gpt.py: error: batch_size=7 should be a multiple of the 2 processes" in done.stderr
