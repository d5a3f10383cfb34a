"""Both scripts as notebooks in a real kernel, cells run again; scripts in other programs."""
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jupytext
import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT, TEXT, TINY, options


def with_numbers(source, **numbers):
    """A script's source, or a notebook's cell, whose hyperparameters are these."""
    for name, value in numbers.items():
        source = re.sub(rf"(?m)^{name} = .*?  #", f"{name} = {value!r}  #", source)
    return source


class Book:
    """A script as a notebook beside a short text, with a kernel of its own."""

    def __init__(self, script, folder):
        (folder / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
        shutil.copy(ROOT / script, folder)
        self.script, self.folder = script, folder
        self.cells = jupytext.read(folder / script).cells
        self.client = nbclient.NotebookClient(
            nbformat.v4.new_notebook(), timeout=300, kernel_name="python3", allow_errors=True,
            resources={"metadata": {"path": str(folder)}})

    def do(self, source):
        """Run one cell; return what it says, and the traceback if there is one."""
        self.client.nb.cells = [nbformat.v4.new_code_cell(source)]
        self.outputs = self.client.execute_cell(self.client.nb.cells[0], 0).outputs
        self.error = "".join("\n".join(output.traceback) for output in self.outputs
                             if output.output_type == "error")
        return "".join(output.text for output in self.outputs if output.output_type == "stream")

    def run(self, first="", last=None, **numbers):
        """Run the code cells between two headings as they are, or with these hyperparameters."""
        texts = [cell.source + "\n" if cell.cell_type == "markdown" else "" for cell in self.cells]
        start = next(i for i, text in enumerate(texts) if first in text)
        end = next((i for i, text in enumerate(texts) if last and last in text), len(texts))
        said, self.shown = "", []
        for cell in self.cells[start:end]:
            if cell.cell_type == "code":
                said += self.do(with_numbers(cell.source, **numbers))
                self.shown += [output for output in self.outputs if "data" in output]
                if self.error:
                    break
        return said


@pytest.fixture(scope="module", params=["bigram.py", "gpt.py"])
def any_book(request, tmp_path_factory):
    """Each script, its kernel running; variables of other cells lie about in it."""
    book = Book(request.param, tmp_path_factory.mktemp("book"))
    with book.client.setup_kernel():
        book.do("step, x, name, i, best, loss, text, start = -5, None, 7, 'i', 0, 'no', None, {}")
        yield book


@pytest.fixture
def book(any_book):
    """The notebook gpt.py."""
    if any_book.script != "gpt.py":
        pytest.skip("gpt.py only")
    return any_book


def losses(said):
    """The steps and the losses in validation that a training printed."""
    return {int(step): float(loss)
            for step, loss in re.findall(r"(?m)^step (\d+): .* val loss (\S+) *$", said)}


def test_runs_as_a_notebook(any_book):
    steps = []
    for cell in any_book.cells:
        if cell.cell_type == "markdown":
            assert not cell.source.startswith("# #")
            steps += map(int, re.findall(r"(?m)^## Step (\d+): \w", cell.source))
    gpt = any_book.script == "gpt.py"
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= (14 if gpt else 0)
    said = any_book.run(**{**TINY, "max_iters": 30, "save": "gpt.pt"})
    assert not any_book.error
    found = losses(said)
    assert list(found) == list(range(0, 31, 5)) and found[30] < found[0] - 0.2
    assert "--- sample 1 of 1 ---\n" in said and "\r" not in said
    if gpt:
        assert (any_book.folder / "gpt.pt").exists()
        assert (any_book.folder / "gpt.pt.png").read_bytes()[:4] == b"\x89PNG"
        assert any("image/png" in output.data for output in any_book.shown)


def test_numbers_changed_and_run_from_there(any_book):
    numbers = {**TINY, "max_iters": 10}
    first = any_book.run(**numbers)
    said = any_book.run("## Hyperparameters", **{**numbers, "n_embd": 32, "block_size": 24,
                                                 "max_iters": 5, "part": 1, "learning_rate": 0.01})
    assert not any_book.error and list(losses(said)) == [0, 5]
    again = any_book.run("## Hyperparameters", **numbers)
    assert again == first and list(losses(again)) == [0, 5, 10]


def test_a_new_model_trained_again_is_the_one_that_is_kept_and_writes(book):
    good = losses(book.run(**{**TINY, "max_iters": 60, "eval_interval": 30, "save": "new.pt"}))
    book.do("max_iters = eval_interval = 5; learning_rate = muon_lr = 0.001")
    book.run("## Model and optimizer\n", "## Evaluation")
    book.run("## Model and optimizers of part two", "# Extras")
    said = book.run("## The run", "## Extra: a picture")
    new = losses(said)
    assert not book.error and list(new) == [0, 5] and new[5] > good[60]

    assert f"the best model (step 5, val loss {new[5]:.4f}) writes:" in said
    kept = torch.load(book.folder / "new.pt", weights_only=True)["best"]
    assert kept["step"] == 5 and kept["val_loss"] == pytest.approx(new[5], abs=1e-4)
    assert book.do("print(model.lm_head.weight[0].tolist())") == (
        f"{kept['weights']['lm_head.weight'][0].tolist()}\n")


def test_part_two_run_twice_is_part_two_run_once(book):
    look = """with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.5, 0.6, p.numel()).sin().view_as(p))
        print(sum(p.numel() for p in model.parameters()), model(data[None, :16])[0].sum(1))"""
    book.run(**TINY)
    once = book.do(look)
    start, end = (next(i for i, cell in enumerate(book.cells) if cell.source.startswith(title))
                  for title in ("# Part two", "# Extras"))
    for cell in book.cells[start:end]:
        if cell.cell_type == "code":
            assert not book.do(cell.source) + book.do(cell.source) + book.error
    assert "tensor" in once and book.do(look) == once


def test_interrupted_and_trained_again(book):
    long = {**TINY, "max_iters": 10**5, "eval_interval": 50, "save": "stop.pt"}
    file, kept = book.folder / "stop.pt", []

    def interrupt():
        """Once the file has been written anew, the training is under way."""
        while not file.exists() or file.stat().st_mtime_ns in kept:
            time.sleep(0.01)
        os.kill(book.client.km.provisioner.process.pid, signal.SIGINT)

    book.run(last="## The run", **long)
    assert not book.error
    for _ in range(2):
        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        said = book.run("## The run", "## Extra: from here on")
        thread.join()
        kept.append(file.stat().st_mtime_ns)
        found = losses(said)
        assert not book.error and "stopped by Ctrl-C; --load=stop.pt goes on" in said
        assert list(found)[:2] == [0, 50] and max(found) < 10**5
    said = book.run("## Extra: from here on", "## Extra: a picture")
    assert not book.error and "the best model" in said and "--- sample 1 of 1 ---" in said


@pytest.mark.parametrize("wrong, line", [
    ({"prompt": "\N{SNOWMAN}"}, "prompt='\N{SNOWMAN}' has characters that are not in the text"),
    ({"text_file": "nowhere.txt"}, ".*nowhere.txt.*"),
    ({"block_size": 3000}, "input.txt has 20,?000 characters.*")])
def test_a_complaint_is_one_line_and_the_kernel_lives(any_book, wrong, line):
    said = any_book.run(**{**TINY, **wrong})
    assert re.search(rf"(?m)^\S+: error: {line}$", said), said[-300:] + any_book.error[-300:]
    assert len(any_book.error.splitlines()) <= 3 and "Traceback" not in said + any_book.error
    assert "--- sample" not in said and any_book.do("print(6 * 7)") == "42\n"


def test_ipython_run_reads_its_options(any_book):
    script = any_book.script
    words = " ".join(options(script, {**TINY, "max_iters": 2}))
    said = any_book.do(f"%run {script} {words}")
    assert not any_book.error and list(losses(said)) == [0, 2]
    said = any_book.do(f"%run {script} --max_item=2")
    assert "unrecognized arguments: --max_item=2" in said and any_book.do("print(6 * 7)") == "42\n"


@pytest.mark.parametrize("name, program", [
    ("other.py", "import gpt"), ("t.py", "import gpt"), (None, "import gpt"),
    ("other.py", "import runpy; runpy.run_path('gpt.py')")])
def test_another_programs_command_line_is_not_read(name, program, tmp_path):
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    (tmp_path / "gpt.py").write_text(with_numbers(source, **TINY), encoding="utf-8")
    (tmp_path / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    if name:
        (tmp_path / name).write_text(f"import sys; sys.path[0] = '.'; {program}")
    words = [name, "--max_iters=3", "--colour=red"] if name else []
    done = subprocess.run([sys.executable, *words], input=program, text=True,
                          capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and list(losses(done.stdout)) == [0]
