"""Both scripts as notebooks in a real kernel."""
import os
import re
import shutil
import signal
import threading
import time

import jupytext
import nbclient
import nbformat
import pytest
from conftest import ROOT, TEXT, TINY, edited, losses


class Book:
    """A script as a notebook beside a short text, with a kernel of its own."""

    def __init__(self, script, folder):
        (folder / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
        shutil.copy(ROOT / script, folder)
        self.folder, self.cells = folder, jupytext.read(folder / script).cells
        self.client = nbclient.NotebookClient(
            nbformat.v4.new_notebook(), timeout=300, kernel_name="python3", allow_errors=True,
            resources={"metadata": {"path": str(folder)}})

    def do(self, source):
        """Run one cell; return what it says, and set error to the traceback if there is one."""
        self.client.nb.cells = [nbformat.v4.new_code_cell(source)]
        self.outputs = self.client.execute_cell(self.client.nb.cells[0], 0).outputs
        self.error = "".join("\n".join(output.traceback) for output in self.outputs
                             if output.output_type == "error")
        return "".join(output.text for output in self.outputs if output.output_type == "stream")

    def run(self, first="", last=None, **numbers):
        """Run the code cells between two headings, with these numbers."""
        texts = [cell.source + "\n" if cell.cell_type == "markdown" else "" for cell in self.cells]
        start = next(i for i, text in enumerate(texts) if first in text)
        end = next(i for i, text in enumerate(texts) if last in text) if last else len(texts)
        said, self.shown = "", []
        for cell in self.cells[start:end]:
            if cell.cell_type == "code":
                said += self.do(edited(cell.source, **numbers))
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
    if "gpt" not in "".join(path.name for path in any_book.folder.glob("*.py")):
        pytest.skip("gpt.py only")
    return any_book


def test_runs_as_a_notebook(any_book):
    titles = []
    for cell in any_book.cells:
        if cell.cell_type == "markdown":
            assert not cell.source.startswith("# #")
            titles += map(int, re.findall(r"(?m)^## Step (\d+): \w", cell.source))
    assert titles == list(range(1, len(titles) + 1))
    gpt = bool(titles)
    said = any_book.run(**{**TINY, "max_iters": 30})
    assert not any_book.error
    found = losses(said)
    assert list(found) == list(range(0, 31, 5)) and found[30] < found[0] - 0.2
    if gpt:
        assert "step 10 of 30: loss" in said and "--- sample 1 of 1 ---\n" in said
        assert (any_book.folder / "gpt.pt").exists()
        assert (any_book.folder / "gpt.pt.png").read_bytes()[:4] == b"\x89PNG"
        assert any("image/png" in output.data for output in any_book.shown)


def test_numbers_changed_and_run_from_there(any_book):
    numbers = {**TINY, "save": ""}
    first = any_book.run(**numbers)
    said = any_book.run("## Hyperparameters", **{**numbers, "n_embd": 32, "block_size": 24,
                                                   "max_iters": 5, "learning_rate": 0.01})
    assert not any_book.error and list(losses(said)) == [0, 5]
    again = any_book.run("## Hyperparameters", **numbers)
    assert not any_book.error and losses(again) == losses(first)


def test_interrupted_and_gone_on_with(book):
    numbers = {**TINY, "max_iters": 10**5, "eval_interval": 50, "save": "stop.pt"}
    file = book.folder / "stop.pt"

    def interrupt():
        while not file.exists():
            time.sleep(0.01)
        os.kill(book.client.km.provisioner.process.pid, signal.SIGINT)

    book.run(last="## The text", **numbers)
    book.do("momentum = 0.75")  # in a cell of one's own
    book.run("## The text", last="## The run", **numbers)
    assert not book.error
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    said = book.run("## The run")
    thread.join()
    step = int(re.search(r"stopped; --load=stop.pt goes on from step (\d+)", said)[1])
    assert not book.error and step >= 50 and "--- sample 1 of 1 ---" in said
    said = book.run(**{**numbers, "load": "stop.pt"}, last="## Extra: speed and progress")
    assert not book.error and book.do("print(first_step)") == f"{step}\n"
    assert book.do("print(momentum)") == "0.75\n"


@pytest.mark.parametrize("wrong, line", [
    ({"prompt": "\N{SNOWMAN}"}, ".*in the prompt is not in input.txt"),
    ({"text_file": "nowhere.txt"}, ".*nowhere.txt.*"),
    ({"block_size": 3000}, ".*input.txt.*more than 30000 characters.*")])
def test_a_complaint_is_one_line_and_the_kernel_lives(book, wrong, line):
    said = book.run(**{**TINY, "load": "", **wrong})
    assert re.search(rf"(?m)^\S+: error: {line}$", said), said[-300:] + book.error[-300:]
    assert "Traceback" not in said + book.error and "--- sample" not in said
    assert book.do("print(6 * 7)") == "42\n"
