"""gpt.py keeps its best model and the state of the run: nothing is lost, whatever happens.

Some runs here are whole programs of their own. The many that are killed are children forked off one
process that has imported torch once, so that twenty kills do not cost twenty imports; each still
runs all of gpt.py, in a folder of its own, and a SIGKILL ends it as it ends any program.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TEXT, options, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
GPT = ROOT / "gpt.py"
STEPS, EVERY, BATCH, BLOCK = 12, 2, 8, 16
NUMBERS = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": BLOCK, "batch_size": BATCH,
           "max_iters": STEPS, "eval_interval": EVERY, "max_new_tokens": 9,
           "dtype": "float32", "dropout": 0.2, "text_file": "text.txt"}
OVERFIT = NUMBERS | {"max_iters": 40, "eval_interval": 5, "batch_size": 32, "dropout": 0.0,
                     "learning_rate": 0.02, "muon_lr": 0.1, "weight_decay": 0.0}

# For each line of JSON: run gpt.py in a child, and tell its process id and how it ended. Asked to,
# it counts the lines of Python executed in gpt.py and in torch.save: "at" says after how many of
# them to send oneself which signal, "log" where to note, for each of them, the step of the training
# and whether a file was being written.
FORKS = """
import json, os, signal, sys
import numpy, requests, torch
sys.modules["matplotlib"] = None  # no picture: it would take longer than all the rest
torch.optim.AdamW([torch.zeros(1)])  # the first one imports more
code = compile(open(script := sys.argv[1], encoding="utf-8").read(), script, "exec")
job = log = count = None
space = {"__name__": "__main__", "__file__": script}
def each_line(frame, event, arg):
    global count
    if event == "line":
        count += 1
        if job["log"]:
            log.append((space.get("step", -1), os.path.exists("gpt.pt.part")))
        if str(count) in job["at"]:
            os.kill(os.getpid(), job["at"][str(count)])
    return each_line
def each_call(frame, event, arg):
    name = frame.f_code.co_filename.replace(os.sep, "/")
    return each_line if name == script or name.endswith("torch/serialization.py") else None
for line in sys.stdin:
    job, log, count = json.loads(line), [], 0
    if child := os.fork():
        print(child, flush=True)
        sys.stdin.readline()  # until then it can be killed, even if it has ended by itself
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(job["cwd"])
    for number, name in enumerate([os.devnull, "stdout", "stderr"]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [script, *job["args"]]
    if job["at"] or job["log"]:
        sys.settrace(each_call)
    status = None
    try:
        exec(code, space)
    except SystemExit as end:
        status = end.code
    sys.settrace(None)
    sys.stdout.flush()
    if job["log"]:
        open(job["log"], "w").write(json.dumps(log))
    os._exit(status or 0)
"""


class Run:
    """One run of gpt.py in a folder with text.txt, in a child that was forked for it."""

    def __init__(self, forks, folder, *args, at=None, log="", **numbers):
        folder.mkdir(exist_ok=True)
        if not (folder / "text.txt").exists():
            (folder / "text.txt").write_text(TEXT[:1000], encoding="utf-8")
        job = {"args": [*options(GPT, numbers), *args], "cwd": str(folder), "at": at or {},
               "log": log}
        self.folder, self.forks = folder, forks
        print(json.dumps(job), file=forks.stdin, flush=True)
        self.pid = int(forks.stdout.readline())

    def end(self):
        """Wait until it has ended; note what it said and what it kept."""
        print(file=self.forks.stdin, flush=True)
        self.status = int(self.forks.stdout.readline())
        self.stdout, self.stderr = (
            (self.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        self.losses = losses(self.stdout)
        kept = self.folder / "gpt.pt"
        self.kept = torch.load(kept, weights_only=True) if kept.exists() else None
        return self


def losses(stdout):
    """The lines of evaluations: for each step, its train and val loss."""
    found = re.findall(r"(?m)^step (\d+): train loss (\S+), val loss (\S+)$", stdout)
    return {int(step): (float(train), float(val)) for step, train, val in found}


def answers(stdout):
    """What a run has written after all training."""
    assert stdout.count("--- sample 1 of") == 1
    return stdout[stdout.index("--- sample 1 of"):].split("pip install matplotlib")[0]


def differences(a, b, at=""):
    """Where two kept states differ, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [found for key in a for found in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    return [] if type(a) is type(b) and a == b else [at]


@pytest.fixture(scope="module")
def forks():
    """The process that has imported torch and forks a child for each run."""
    process = subprocess.Popen([sys.executable, "-c", FORKS, GPT.as_posix()], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """The run that nothing interrupts, with a log of its lines."""
    done = Run(forks, tmp_path_factory.mktemp("whole"), log="log", **NUMBERS).end()
    assert done.status == 0, done.stderr
    assert list(done.losses) == list(range(0, STEPS + 1, EVERY))
    assert 900 // BLOCK < BATCH * STEPS // 1.5, "an epoch is to end well within the run"
    done.log = json.loads((done.folder / "log").read_text())
    return done


@pytest.fixture(scope="module")
def overfit(forks, tmp_path_factory):
    """A run whose best model is not its last one."""
    return Run(forks, tmp_path_factory.mktemp("overfit"), "--prompt=First", **OVERFIT).end()


def test_the_kept_file_is_tensors_and_plain_types(whole):
    """Nothing in the file but tensors and plain Python values, and all that is needed is there."""
    def kinds(thing):
        if isinstance(thing, dict):
            return {k for key, value in thing.items() for k in kinds(key) | kinds(value)}
        if isinstance(thing, (list, tuple)):
            return {k for value in thing for k in kinds(value)}
        return {type(thing)}
    kept = torch.load(whole.folder / "gpt.pt", weights_only=True)
    assert kinds(kept) <= {torch.Tensor, str, int, float, bool, type(None)}
    assert kept["step"] == STEPS and kept["chars"] == sorted(set(TEXT[:1000]))
    assert {name: kept["settings"][name] for name in NUMBERS} == NUMBERS
    assert not (whole.folder / "gpt.pt.part").exists()


def test_the_best_model_by_validation_is_kept(forks, overfit, tmp_path):
    """The kept weights have the lowest of all val losses, when measured again by another run."""
    best = min(overfit.losses, key=lambda step: overfit.losses[step][1])
    assert 0 < best < 40, overfit.losses
    assert overfit.kept["best"]["step"] == best
    assert round(overfit.kept["best"]["val_loss"], 4) == overfit.losses[best][1]
    again = Run(forks, tmp_path, "--save=", load=overfit.folder / "gpt.pt", max_iters=1,
                learning_rate=0, muon_lr=0).end()
    assert again.losses[0] == overfit.losses[best]


def test_without_a_file_the_best_model_lives_in_memory(forks, overfit, tmp_path):
    """--save= says and samples just the same, from the best model, and leaves no file behind."""
    done = Run(forks, tmp_path, "--prompt=First", "--save=", **OVERFIT).end()
    assert done.status == 0, done.stderr
    def steady(stdout):
        return re.sub(r"[\d,]+ characters/s, \S+ minutes", "", stdout)
    assert steady(done.stdout) == steady(overfit.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr", "stdout", "text.txt"]


def test_a_kept_model_samples_without_text_or_training(overfit, tmp_path):
    """--load and --max_iters=0: the answers of the run that saved it, and nothing is touched."""
    kept = overfit.folder / "gpt.pt"
    before, folder = kept.read_bytes(), tmp_path / "empty"
    folder.mkdir()
    script = shutil.copy(GPT, tmp_path)  # where no input.txt lies beside it
    done = run(script, f"--load={kept}", "--max_iters=0", "--prompt=First", cwd=folder, tiny=False)
    assert done.returncode == 0 and done.stderr == ""
    assert not losses(done.stdout)
    assert answers(done.stdout) == answers(overfit.stdout)
    assert len(answers(done.stdout)) == len("--- sample 1 of 1 ---\nFirst\n") + 9
    assert kept.read_bytes() == before and not list(folder.iterdir())


def test_a_kept_model_is_trained_further_on_another_text(forks, overfit, tmp_path):
    """--load and --text_file: its weights, but losses of the other text, a best loss that starts
    afresh, and optimizers that have seen nothing yet."""
    (tmp_path / "other.txt").write_text(TEXT[800::-1], encoding="utf-8")  # harder: it is reversed
    done = Run(forks, tmp_path, load=overfit.folder / "gpt.pt", text_file="other.txt", max_iters=3,
               eval_interval=1, learning_rate=0.001, muon_lr=0.001).end()
    assert done.status == 0, done.stderr
    assert list(done.losses) == [0, 1, 2, 3]
    assert done.kept["best"]["val_loss"] > overfit.kept["best"]["val_loss"]
    lowest = min(val for train, val in done.losses.values())
    assert round(done.kept["best"]["val_loss"], 4) == lowest
    assert done.losses[0][0] < math.log(len(overfit.kept["chars"])), "weights start untrained"
    assert done.kept["chars"] == overfit.kept["chars"] and done.kept["step"] == 3
    assert {int(state["step"]) for state in done.kept["optimizer"]["state"].values()} == {3}


def test_unknown_characters_are_named_before_anything_starts(overfit, tmp_path):
    """A text with other characters than the kept model knows: named, and how often they occur."""
    (tmp_path / "other.txt").write_text(TEXT[:900] + "Zoë, Zoë\n€" * 3, encoding="utf-8")
    assert set("Zë€").isdisjoint(TEXT[:1000])
    done = run(GPT, f"--load={overfit.folder / 'gpt.pt'}", "--text_file=other.txt", cwd=tmp_path,
               tiny=False)
    assert done.returncode == 2 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith(
        "error: 'Z' (6 times), 'ë' (6 times), '€' (3 times) not in the vocabulary, ")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_the_command_line_before_the_checkpoint_before_the_block(forks, overfit, tmp_path):
    """Each number comes from the first of the three that has it."""
    done = Run(forks, tmp_path, load=overfit.folder / "gpt.pt", max_iters=2, temperature=0.5,
               n_layer=1).end()
    assert done.status == 0, done.stderr
    assert done.kept["settings"] == overfit.kept["settings"] | {"max_iters": 2, "temperature": 0.5}
    assert done.kept["settings"]["max_new_tokens"] == 9 != 500
    more = Run(forks, tmp_path, load=overfit.folder / "gpt.pt", max_iters=0, max_new_tokens=4).end()
    assert len(answers(more.stdout)) == len("--- sample 1 of 1 ---\n\n\n") + 4


@pytest.mark.parametrize("name, value", [
    ("n_embd", 32), ("n_head", 1), ("n_layer", 2), ("block_size", 8)])
@pytest.mark.parametrize("option", ["load", "resume"])
def test_a_shape_that_differs_is_an_error(forks, overfit, tmp_path, option, name, value):
    """A kept model has the shape it has; one line says which, and nothing is written."""
    kept = overfit.folder / "gpt.pt"
    done = Run(forks, tmp_path, **{option: kept, name: value}).end()
    assert done.status == 2 and done.stdout == "" and done.kept is None
    line, = done.stderr.splitlines()
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 16}
    assert line == f"error: the model in {kept} has to keep {shape}"


def test_a_finished_run_says_so_and_samples(whole, tmp_path):
    """--resume of a run at its end: no training, the same answers, the file as it was."""
    for name in ("gpt.pt", "text.txt"):
        shutil.copy(whole.folder / name, tmp_path)
    before = (tmp_path / "gpt.pt").read_bytes()
    done = run(GPT, "--resume=gpt.pt", cwd=tmp_path, tiny=False)
    assert done.returncode == 0 and done.stderr == ""
    assert f"the run in gpt.pt is finished: it has made its {STEPS} adjustments\n" in done.stdout
    assert not losses(done.stdout)
    assert answers(done.stdout) == answers(whole.stdout)
    assert (tmp_path / "gpt.pt").read_bytes() == before


def test_a_finished_run_goes_on_if_given_more_steps(forks, whole, tmp_path):
    """--resume with a larger --max_iters trains from the last step to the new end."""
    done = Run(forks, tmp_path, resume=whole.folder / "gpt.pt", max_iters=STEPS + 3).end()
    assert done.status == 0, done.stderr
    assert list(done.losses) == [STEPS, STEPS + 2, STEPS + 3]
    assert done.losses[STEPS] == whole.losses[STEPS]
    assert done.kept["step"] == STEPS + 3


def go_on(forks, killed, whole):
    """Check what a killed run has left, go on from it to the end, and compare that with the run
    that nothing interrupted."""
    assert killed.status in (-signal.SIGKILL, 0) and killed.stderr == ""
    reached, step = max(killed.losses, default=None), killed.kept and killed.kept["step"]
    if killed.kept:
        # The line of an evaluation comes before the save, and the sample right after it.
        line = f"step {reached}: "
        sampled = re.search(rf"(?m)^{line}.*\n(.|\n)", killed.stdout) if reached else None
        assert step in ({reached} if sampled else {reached, reached - EVERY})
        assert EVERY <= step and killed.kept["best"]["step"] <= step
    else:
        assert reached in (None, 0, EVERY)
    numbers = {"resume": "gpt.pt"} if killed.kept else NUMBERS
    done = Run(forks, killed.folder, **numbers).end()
    assert done.status == 0, done.stderr
    again = range(step or 0, STEPS + 1, EVERY) if step != STEPS else []  # else it was finished
    assert done.losses == {n: whole.losses[n] for n in again}
    assert answers(done.stdout) == answers(whole.stdout)
    assert differences(done.kept, whole.kept) == []
    assert not (killed.folder / "gpt.pt.part").exists()


def test_killed_anywhere_a_run_ends_as_if_it_had_not_been(forks, whole, tmp_path):
    """SIGKILL at 20 moments all over the run, dropout on, before and after the end of an epoch."""
    count = len(whole.log)
    for part in range(20):
        at = round(count * (part + 0.5) / 20)
        killed = Run(forks, tmp_path / str(part), at={at: signal.SIGKILL}, **NUMBERS).end()
        assert killed.status == -signal.SIGKILL
        go_on(forks, killed, whole)


def test_killed_in_the_middle_of_a_save_the_file_stays_whole(forks, whole, tmp_path):
    """SIGKILL at 9 moments within saves, from the first byte to just before the replacement."""
    writing = [i for i, (step, part) in enumerate(whole.log, 1) if part]
    saves = {}
    for i in writing:
        saves.setdefault(whole.log[i - 1][0], []).append(i)
    assert list(saves) == list(range(EVERY, STEPS + 1, EVERY))
    for step in (EVERY, 8, STEPS):
        for name, at in [("first", saves[step][0]), ("mid", saves[step][len(saves[step]) // 2]),
                         ("last", saves[step][-1])]:
            killed = Run(forks, tmp_path / f"{step}{name}", at={at: signal.SIGKILL}, **NUMBERS)
            assert killed.end().status == -signal.SIGKILL
            assert (killed.folder / "gpt.pt.part").exists()
            assert (killed.kept["step"] if killed.kept else 0) == step - EVERY
            go_on(forks, killed, whole)


def test_killed_from_outside(forks, whole, tmp_path):
    """SIGKILL from another process: 3 as soon as a file is seen being written, 3 at any time."""
    for number in range(6):
        killed = Run(forks, tmp_path / str(number), **NUMBERS)
        part, said = killed.folder / "gpt.pt.part", killed.folder / "stdout"
        deadline = time.monotonic() + 20  # the file may be gone again before we look: then go on
        while number < 3 and not part.exists() and time.monotonic() < deadline:
            if said.exists() and b"the best model" in said.read_bytes():
                break
        time.sleep(0.05 * max(0, number - 2))
        os.kill(killed.pid, signal.SIGKILL)
        go_on(forks, killed.end(), whole)


def test_killed_again_and_again(forks, whole, tmp_path):
    """A run of which no life lasts for more than a third: each begins where the last one ended."""
    numbers, ends = NUMBERS, []
    for life in range(30):
        done = Run(forks, tmp_path, at={len(whole.log) // 3: signal.SIGKILL}, **numbers).end()
        ends.append(done.status)
        if done.status != -signal.SIGKILL:
            break
        numbers = {"resume": "gpt.pt"}
    assert ends[-1] == 0 and len(ends) > 3
    assert differences(done.kept, whole.kept) == []


def in_step_4(whole):
    """A moment in the training of step 4, after its evaluation: step 5 has none and is as long."""
    steps = [step for step, part in whole.log]
    return len(steps) - steps[::-1].index(4) - steps.count(5) // 2


@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_ctrl_c_ends_the_training_and_resume_goes_on(forks, whole, tmp_path, dropout):
    """One Ctrl-C in step 4: it is finished and evaluated, the state is kept, the sample written;
    the resumed run then has the weights of the uninterrupted one."""
    numbers = NUMBERS | {"dropout": dropout}
    other = whole if dropout else Run(forks, tmp_path / "other", **numbers).end()
    at = in_step_4(whole)
    done = Run(forks, tmp_path / "run", at={at: signal.SIGINT}, **numbers).end()
    assert done.status == 0 and done.stderr == ""
    assert list(done.losses) == [0, 2, 4, 5]
    assert done.kept["step"] == 5
    assert done.stdout.count("stopped by Ctrl-C; --resume=gpt.pt goes on\n") == 1
    assert len(answers(done.stdout)) == len("--- sample 1 of 1 ---\n\n\n") + 9
    more = Run(forks, done.folder, resume="gpt.pt").end()
    assert more.status == 0, more.stderr
    assert more.losses == {step: other.losses[step] for step in (6, 8, 10, 12)}
    for kept in (more.kept, other.kept):
        del kept["best"]  # an evaluation that Ctrl-C brought about is extra
    assert differences(more.kept, other.kept) == []


def test_a_second_ctrl_c_stops_at_once(forks, whole, tmp_path):
    """The second comes in the last evaluation: no further word, and the file is that of step 4."""
    at = in_step_4(whole)
    length = [step for step, part in whole.log].count(5)
    signals = {at: signal.SIGINT, at + length // 2 + 40: signal.SIGINT}
    done = Run(forks, tmp_path, at=signals, **NUMBERS).end()
    assert done.status == 130 and done.stderr == ""
    assert list(done.losses) == [0, 2, 4] and "sample 1" not in done.stdout
    assert done.kept["step"] == 4


def test_ctrl_c_in_a_program_of_its_own(small_text, tmp_path):
    """The same as a user has it: a long run, Ctrl-C once it is under way, then the resume line."""
    numbers = NUMBERS | {"text_file": small_text, "max_iters": 10**6, "eval_interval": 20}
    process = subprocess.Popen(
        [sys.executable, str(GPT), *options(GPT, numbers)], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        stdout = ""
        while "step 20:" not in stdout and (line := process.stdout.readline()):
            stdout += line
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and stderr == ""
    last = max(losses(stdout + rest))
    assert torch.load(tmp_path / "gpt.pt", weights_only=True)["step"] == last < 10**6
    assert "stopped by Ctrl-C; --resume=gpt.pt goes on" in rest.splitlines()
    assert "--- sample 1 of 1 ---" in rest.splitlines()
