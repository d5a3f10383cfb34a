"""The pair as a lesson: the diff, the steps as scripts, the shapes in the comments, the README."""
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from types import SimpleNamespace

import pytest
import steps
from conftest import ROOT, TEXT, Quick, names

SOURCE = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("bigram.py", "gpt.py")}
STEPS = [0, *steps.titles()]


def hunks(tool):
    """The hunks below the docstring, each as (first line in gpt.py, its text), by git or by GNU."""
    command = {"git": ["git", "diff", "--no-index", "-U0", "bigram.py", "gpt.py"],
               "GNU": ["diff", "-U0", "bigram.py", "gpt.py"]}[tool]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8").stdout
    parts = re.split(r"^@@ -\S+ \+(\d+)\S* @@.*\n", out, flags=re.M)[1:]
    top = SOURCE["gpt.py"].split("\n").index("# %%") + 1
    return [(int(at), text) for at, text in zip(parts[::2], parts[1::2]) if int(at) >= top]


@pytest.mark.parametrize("tool", ["git", "GNU"])
def test_every_hunk_has_a_name_and_little_of_bigram_goes(tool):
    found = hunks(tool)
    assert len(found) > 10
    for at, text in found:
        assert re.search(r"\bStep \d+|\bExtra\b", text), f"no name in the hunk at {at}:\n{text}"
    gone = [line for _, text in found for line in text.split("\n") if line.startswith("-")]
    assert 0 < len(gone) <= 15
    assert "Step" not in SOURCE["bigram.py"] and "Extra" not in SOURCE["bigram.py"]


def test_steps_are_counted_without_a_gap_and_rise_down_the_file():
    numbers = [int(n) for n in re.findall(r"(?m)^# ## Step (\d+): ", SOURCE["gpt.py"])]
    assert numbers == list(range(1, len(numbers) + 1)) == STEPS[1:]
    mentioned = {int(n) for n in re.findall(r"\bStep (\d+)", SOURCE["gpt.py"])}
    assert mentioned == set(numbers)


def test_an_edit_that_does_not_fit_just_once_is_an_error():
    for source in ("", "ab ab"):
        with pytest.raises(ValueError, match="stands"):
            steps.edit(source, [("ab", "c")])


def code_of(source):
    """The code of a script without comments and docstrings, as a comparable text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = node.body[bool(ast.get_docstring(node)):]
    return ast.dump(tree)


def test_first_and_last_are_the_pair(tmp_path):
    assert steps.script(0) == SOURCE["bigram.py"]
    last = steps.script(STEPS[-1])
    kept = set(SOURCE["gpt.py"].split("\n"))
    new = [line for line in last.partition("# %%")[2].split("\n") if line not in kept]
    assert new == ["first_step = 0", "evaluate(first_step)",
                   "for step in range(first_step + 1, max_iters + 1):"]
    assert "Extra" not in last.partition("# %%")[2]
    # What is left out changes no number: the losses are those of gpt.py, to the last digit.
    (tmp_path / "last.py").write_text(last, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT[:20000], encoding="utf-8")
    numbers = ["--text_file=text.txt", "--n_embd=16", "--block_size=16", "--max_iters=12",
               "--eval_interval=4", "--max_new_tokens=9"]
    runs = [Quick(tmp_path / "last.py", *numbers, cwd=tmp_path, tiny=False).end(),
            Quick(ROOT / "gpt.py", *numbers, "--save=", "--dtype=float32", cwd=tmp_path,
                  tiny=False).end()]
    losses = [re.findall(r"(?m)^step \d+: .*", run.stdout) for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_a_script_that_runs(step, tmp_path):
    source, name = steps.script(step), steps.file_name(step)
    (tmp_path / name).write_text(source, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT[:9000], encoding="utf-8")
    later = {int(n) for n in re.findall(r"\bStep (\d+)", source)} - set(range(step + 1))
    assert not later and not re.search(r"\bExtra\b", source.partition("# %%")[2])
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F", name],
                          cwd=tmp_path, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
    done = Quick(tmp_path / name, "--text_file=text.txt", "--block_size=8", "--max_iters=2",
                 "--eval_interval=2", "--max_new_tokens=9", "--prompt=The", cwd=tmp_path,
                 tiny=False).end()
    assert done.status == 0, done.stderr
    assert len(re.findall(r"(?m)^step [02]: train loss \d", done.stdout)) == 2
    answer = done.stdout.split("--- sample 1 of 1 ---\n")[1]
    assert answer.startswith("The") and len(answer) == 3 + 9 + 1
    # The bare script has no options, and the same losses and sample.
    source = steps.bare(source)
    for number in ("block_size = 8", "max_iters = 2", "eval_interval = 2", "max_new_tokens = 9",
                   'text_file = "text.txt"', 'prompt = "The"'):
        source, count = re.subn(rf"(?m)^{number.split()[0]} = \S+", number, source)
        assert count == 1
    (tmp_path / name).write_text(source, encoding="utf-8")
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F", name],
                          cwd=tmp_path, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
    bare = Quick(tmp_path / name, cwd=tmp_path, tiny=False).end()
    assert bare.status == 0 and "parser" not in source, bare.stderr
    padded = done.stdout.replace("--- sample 1 of 1 ---\n", "")  # to cover a progress line
    assert bare.stdout == re.sub(r"(?m)(?<=\d) +$", "", padded)


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_step_changes_little(step):
    assert sum(line.startswith("@@") for line in steps.difference(step)) <= 5
    assert 0 < steps.lines_of(step) <= 36
    gone, come = ({line[1:] for line in steps.difference(step) if re.match(rf"\{sign} *def", line)}
                  for sign in "-+")
    assert not gone & come  # no head of a function goes and comes back
    assert code_of(steps.script(step)) != code_of(steps.script(step - 1))


@pytest.mark.parametrize("step", steps.WITHOUT)
def test_taking_a_step_out_of_the_whole_changes_it(step):
    source, options = steps.variants()[f"without {step}"]
    assert options[1:] or code_of(source) != code_of(SOURCE["gpt.py"])


def test_show_and_write(tmp_path):
    def tool(*args):
        return subprocess.run([sys.executable, ROOT / "tests" / "steps.py", *args], cwd=tmp_path,
                              capture_output=True, text=True, encoding="utf-8", check=True).stdout
    tool("--write=all")
    found = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert found == [*map(steps.file_name, STEPS), "input.txt"] and found[0] == "00_bigram.py"
    shown = tool("--show=4")
    assert shown.startswith("Step 4: attention\n") and "+class Head(nn.Module):\n" in shown
    assert all(title in tool("--show") for title in steps.titles().values())


def test_the_readme_is_what_the_tool_writes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert steps.readme(text) == text, "python tests/steps.py --readme"


def test_the_readme_counts_the_lines_of_the_bare_scripts():
    told = re.search(r"in (\d+) lines of code with .*`bare/17_data_augmentation.py` has (\d+)\.",
                     (ROOT / "README.md").read_text(encoding="utf-8")).groups()
    counts = []
    for step in (9, 17):
        source = steps.bare(steps.script(step))
        kinds = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
        lines = {row for token in tokenize.generate_tokens(io.StringIO(source).readline)
                 if token.type in kinds for row in range(token.start[0], token.end[0] + 1)}
        for node in ast.walk(ast.parse(source)):  # without docstrings
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                lines -= {*range(node.lineno, node.end_lineno + 1)}
        counts.append(str(len(lines)))
    assert told == tuple(counts)


def test_what_gpt_py_says_its_steps_are_worth():
    for step in {*STEPS} - {0, 8, 9}:
        text = " ".join(steps.text_of(step).split())
        told = re.search(r"loss is (\S+) instead of (\S+)\.", text).groups()
        assert told == (f"{steps.mean(step):.2f}", f"{steps.mean(step - 1):.2f}"), step
    told = re.search(r"it is (\S+) with four blocks instead of (\S+) with one\.",
                     " ".join(steps.text_of(8).split())).groups()
    assert told == (f"{steps.mean(8, 1200):.2f}", f"{steps.mean(7, 1200):.2f}")
    source = SOURCE["gpt.py"].replace("\n# ", " ")
    told = re.search(r"would end at (\S+), and with it, it ends at (\S+)\.\)", source).groups()
    assert told == (f"{steps.mean('without 15'):.2f}", f"{steps.mean(STEPS[-1]):.2f}")
    told = re.search(r"without it, the loss would be (\S+), not (\S+)\.", source).groups()
    assert told == (f"{steps.mean('without 13'):.2f}", f"{steps.mean(STEPS[-1]):.2f}")
    for step, sentence, gains in ((5, "With one of the three seeds, the loss is not lower.", 2),
                                  (7, "It gains with each of the three seeds.", 3)):
        before, after = steps.by_seed(step - 1), steps.by_seed(step)
        assert sentence in " ".join(steps.text_of(step).split())
        assert sum(after[seed] < before[seed] for seed in before) == gains and len(before) == 3
    told = re.search(r"together, from (\S+) to (\S+)\.", source).groups()
    assert told == (f"{steps.mean(9):.2f}", f"{steps.mean(STEPS[-1]):.2f}")


def test_the_whole_is_compared_on_the_same_seeds(monkeypatch):
    """Where a step was taken out with one seed only, the mean over two must not come in."""
    last = STEPS[-1]
    monkeypatch.setattr(steps, "results", lambda: {
        f"300/1/{last}": [1.5, ""], f"300/2/{last}": [1.9, ""], "300/2/without 5": [2.0, ""],
        "300/2/without 6": [2.1, ""]})  # for a single step, there would be no column
    row = next(line for line in steps.table() if line.startswith("| 5 |"))
    assert row.endswith("| 2.000 (+0.100) |")


def test_losses_fall_from_step_to_step():
    losses = [steps.results()[f"300/1337/{step}"][0] for step in STEPS]
    for step in STEPS[1:]:
        assert losses[step] < losses[step - 1] + 0.02, f"step {step}: {losses}"
        assert steps.mean(step) < steps.mean(step - 1) + 0.02, f"step {step}"
    assert json.loads(steps.MEASURED.read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("script, part, least", [
    ("bigram.py", 1, 6), ("gpt.py", 1, 24), ("gpt.py", 2, 20)])
def test_shapes_in_comments_are_those_of_the_tensors(script, part, least, tmp_path):
    space = names(script, tmp_path, batch_size=3, block_size=7, n_embd=40, n_head=2, n_layer=1,
                  part=part)
    sizes = {"B": 3, "T": 7, "C": 40, "D": 20, "V": space["vocab_size"]}
    wanted, checked, there = documented(SOURCE[script]), set(), []
    file = str(ROOT / script)

    def compare(frame, line):
        targets, shape = wanted[line]
        parts = re.sub(r"(\d)C", r"\1*C", shape).replace("/", "//").split(",")
        expected = tuple(eval(part.strip(), {}, sizes) for part in parts if part.strip())
        for target in targets:
            value = eval(target, frame.f_globals, frame.f_locals)
            assert tuple(value.shape) == expected, f"line {line}: {target} is {value.shape}"
            checked.add(line)

    def trace(frame, event, arg, last={}):
        name = frame.f_code.co_name
        if frame.f_code.co_filename != file or name.startswith("<") or name not in (there or name):
            return None
        if last.get(frame) in wanted and event in ("line", "return"):
            compare(frame, last[frame])
        last[frame] = frame.f_lineno if event != "return" else None
        return trace

    outside = {wanted[line][0][0]: line for line in sorted(wanted)
               if SOURCE[script].split("\n")[line - 1][0] != " "}
    for line in outside.values():  # these have long run; of two of one name, the last is there
        compare(SimpleNamespace(f_globals=space, f_locals={}), line)
    sys.settrace(trace)
    try:
        inputs, targets = space["get_batch"](1)
        space["model"](inputs, targets)
        there = ["generate"]  # the model in it has but one text to read
        list(space["generate"](inputs[0], 1))
    finally:
        sys.settrace(None)
    assert len(checked) >= least, sorted(set(wanted) - checked)
