"""The pair as a lesson: the diff, the steps, the shapes in the comments, the agreed sizes."""
import ast
import difflib
import hashlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, names
from steps import EDITS, LADDER, without

SOURCE = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("bigram.py", "gpt.py")}


def hunks(tool):
    """The hunks below the docstring, each as (first line in gpt.py, its text), by git or by GNU."""
    command = {"git": ["git", "diff", "--no-index", "-U0", "bigram.py", "gpt.py"],
               "GNU": ["diff", "-U0", "bigram.py", "gpt.py"]}[tool]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8").stdout
    parts = re.split(r"^@@ -\S+ \+(\d+)\S* @@.*\n", out, flags=re.M)[1:]
    top = SOURCE["gpt.py"].split("\n").index("# %% Imports") + 1
    return [(int(at), text) for at, text in zip(parts[::2], parts[1::2]) if int(at) >= top]


def steps():
    """The steps as gpt.py tells them: {number: title}."""
    told = re.findall(r"\bStep (\d+): ([^.\n]+)\.", SOURCE["gpt.py"])
    assert len({number for number, _ in told}) == len(told), "a step is told twice"
    return {int(number): title for number, title in told}


@pytest.mark.parametrize("tool", ["git", "GNU"])
def test_every_hunk_belongs_to_a_step(tool):
    found = hunks(tool)
    assert len(found) > 15
    for at, text in found:
        assert re.search(r"\bStep \d+", text), f"no step in the hunk at line {at}:\n{text}"


def test_steps_are_counted_without_a_gap_and_stand_in_the_readme():
    assert sorted(steps()) == list(range(1, len(steps()) + 1))
    assert "Step" not in SOURCE["bigram.py"]
    mentioned = {int(number) for number in re.findall(r"\bStep (\d+)", SOURCE["gpt.py"])}
    assert mentioned == set(steps())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|(]+?) (?:\([^|]*\) )?\|", readme, re.M)
    table = dict(rows[:len(steps())])
    assert {int(number): title for number, title in table.items()} == steps()


@pytest.mark.parametrize("gone", [[step] for step in EDITS] + [
    [later for later in EDITS if later in LADDER and later > step] for step in LADDER[:-1]])
def test_a_step_is_taken_out_by_edits_that_each_fit_once(gone):
    """steps.py measures what a reader would: the edits fit, and what is left is still Python."""
    left = without(SOURCE["gpt.py"], gone)
    assert left != SOURCE["gpt.py"]
    compile(left, "gpt.py", "exec")


def test_nothing_else_is_called_a_step_with_a_number():
    for source in SOURCE.values():
        assert not re.search(r"\bstep \d", re.sub(r"\bStep \d+", "", source))


def test_almost_nothing_of_bigram_disappears():
    lines = [line for at, text in hunks("git") for line in text.split("\n")]
    block = SOURCE["bigram.py"].split("# %% Hyperparameters")[1].split("# %%")[0]
    gone = [line for line in lines if line.startswith("-") and line[1:] not in block.split("\n")]
    assert 0 < len(gone) <= 12


def test_outside_the_hunks_both_are_the_same_to_the_byte():
    old, new = (source.split("# %% Imports")[1].split("\n") for source in SOURCE.values())
    changed = {line for _, text in hunks("git") for line in text.split("\n")}
    for line in difflib.ndiff(old, new):
        if line[0] in "+-":
            assert line[0] + line[2:] in changed


def test_sizes():
    assert SOURCE["gpt.py"].count("\n") <= 450
    assert SOURCE["bigram.py"].count("\n") <= 220
    assert max(len(line) for source in SOURCE.values() for line in source.split("\n")) <= 100
    assert hashlib.sha256((ROOT / "input.txt").read_bytes()).hexdigest() == (
        "8e686582738d110a5ead41d60d3c5a1832927cd4a5969288b1a51881f73555e3")


def documented(source):
    """Return {line: (names, shape)} of the assignments whose comment begins with a shape."""
    lines, found = source.split("\n"), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            match = re.search(r"  # (each )?\(([A-Z0-9+/, ]+)\)", lines[node.end_lineno - 1])
            if match:  # without 'each' the shape is that of the first name
                target = node.targets[0]
                targets = target.elts if isinstance(target, ast.Tuple) else [target]
                targets = targets if match[1] else targets[:1]
                found[node.lineno] = [ast.unparse(name) for name in targets], match[2]
    return found


@pytest.mark.parametrize("script, least", [("gpt.py", 20), ("bigram.py", 5)])
def test_shapes_in_comments_are_those_of_the_tensors(script, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = names(script, batch_size=3, block_size=7, n_embd=40, n_head=2, n_layer=1)
    sizes = {"B": 3, "T": 7, "C": 40, "H": 2, "D": 20, "V": space["vocab_size"], "1": 1, "2": 2}
    assert len({sizes[letter] for letter in "BTCHDV"}) == 6
    wanted, checked = documented(SOURCE[script]), set()
    assert len(wanted) >= least
    file = str(ROOT / script)

    def compare(frame, line):
        targets, shape = wanted[line]
        parts = [part for part in shape.replace("/", "//").split(",") if part.strip()]
        expected = tuple(eval(part, {}, sizes) for part in parts)
        for target in targets:
            value = eval(target, frame.f_globals, frame.f_locals)
            if torch.is_tensor(value):
                assert tuple(value.shape) == expected, f"line {line}: {target} is {value.shape}"
                checked.add(line)

    def trace(frame, event, arg, last={}):
        if frame.f_code.co_filename != file or frame.f_code.co_name.startswith("<"):
            return None
        if last.get(frame) in wanted and event in ("line", "return"):
            compare(frame, last[frame])
        last[frame] = frame.f_lineno if event != "return" else None
        return trace

    for line in wanted:  # those outside of functions have long run
        if SOURCE[script].split("\n")[line - 1][0] != " ":
            compare(SimpleNamespace(f_globals=space, f_locals={}), line)
    sys.settrace(trace)
    try:
        space["LanguageModel"]()
        inputs, targets = space["get_batch"]()
        space["model"](inputs, targets)
        space["model"].generate(inputs, 1)
    finally:
        sys.settrace(None)
    assert checked == set(wanted), f"never checked: {sorted(set(wanted) - checked)}"
