"""Several processes, started by PyTorch's launcher, share the work."""
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


def test_two_processes_average_their_gradients(tmp_path):
    """Each has half of the batch; both end with the gradients of the whole of it."""
    source = GPT.replace("dtype = torch", "fast = False\ndtype = torch").replace(
        "nn.init.zeros_(self", "nn.init.normal_(self").replace("show_progress(step, loss) ", (
            "torch.save((inputs, targets, [p.grad for p in unwrapped.parameters()]), "
            "f'part{rank}') "))
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    two = launch(tmp_path / "edited.py", tmp_path / "two", max_iters=1)
    assert two.returncode == 0, two.stderr
    (a, _, _), (b, _, _) = parts = [torch.load(tmp_path / "two" / f"part{rank}")
                                    for rank in (0, 1)]
    assert a.shape == b.shape == (4, 16)
    one = play(tmp_path / "edited.py", tmp_path, **{**NUMBERS, "max_iters": 0}).space
    inputs, targets = one["get_batch"](1)
    assert torch.equal(inputs, torch.stack([a, b], dim=1).flatten(0, 1))
    model = one["model"]
    expected = torch.autograd.grad(model(inputs, targets)[1], list(model.parameters()))
    assert min(grad.abs().max() for grad in expected) > 1e-4
    for _, _, found in parts:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_only_the_first_process_speaks_and_saves(tmp_path):
    both = launch(ROOT / "gpt.py", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    said = both.stdout[both.stdout.index(" parameters on"):]
    losses = [float(loss) for loss in re.findall(r"(?m)^step .* val loss (\S+)", said)]
    assert len(losses) == 9 and losses[8] < losses[0] - 0.05
    for line in ("parameters on cpu", "--- sample 1 of 1 ---", "saved as gpt.pt"):
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
    done = launch(tmp_path / "edited.py", tmp_path / "two", max_iters=1, plain_iters=0,
                  dropout=0.5)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / "two" / f"hidden{rank}") for rank in (0, 1))
    assert first.shape == second.shape == (4, 16, 16)
    assert 0.4 < first.float().mean() < 0.6 and not torch.equal(first, second)
