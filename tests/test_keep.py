"""gpt.py keeps its best model and the state of the run: nothing is lost, whatever happens."""
import math
import os
import pickle
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, TINY, Quick, names, options, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
NUMBERS = {**TINY, "n_layer": 1, "batch_size": 8, "dropout": 0.2, "momentum": 0.9,
           "weight_decay": 0.1, "max_iters": 12, "eval_interval": 3, "save": "gpt.pt"}
OVERFIT = NUMBERS | {"batch_size": 32, "dropout": 0.1, "weight_decay": 0, "max_iters": 100,
                     "eval_interval": 5, "learning_rate": 0.02, "muon_lr": 0.1}
LONG = NUMBERS | {"max_iters": 200, "eval_interval": 100}
GPU = [('"cuda" in str(', '"cpu" in str('), ("torch.cuda.set_device", "str"),
       ('here = 1 if "cuda"', 'here = 1 if "cpu"')]  # what makes it take the CPU for a GPU
OTHER = TEXT[900::-1] + 'They paid "12.50" (or 34)\n'


def start(script, folder, **numbers):
    """Begin a run in this folder."""
    folder.mkdir(exist_ok=True)
    return Quick(script, *options(script, {"dtype": "float32", **numbers}), cwd=folder, tiny=False)


def result(running):
    """The end of a run without errors: what it said, its losses, its sample, the state it kept."""
    stdout, folder = running.end().stdout, running.folder
    assert running.status == 0 and running.stderr == "", running.stderr
    found = re.findall(r"(?m)^step (\d+): train loss (\S+), val loss (\S+) *$", stdout)
    losses = {int(step): (float(train), float(val)) for step, train, val in found}
    sample, path = stdout.split("--- sample 1 of 1 ---\n")[1], folder / "gpt.pt"
    return SimpleNamespace(stdout=stdout, losses=losses, sample=sample, path=path,
                           kept=load(path) if path.exists() else None)


def finish(*args, **numbers):
    return result(start(*args, **numbers))


def load(path):
    """The plain parts of a checkpoint, its tensors as bytes: equal is equal to the last bit."""
    def plain(thing):
        if isinstance(thing, dict):
            return {plain(name): plain(part) for name, part in thing.items()}
        if isinstance(thing, (list, tuple)):
            return [plain(part) for part in thing]
        if type(thing) is torch.Tensor:
            return thing.numpy().tobytes()
        assert thing is None or type(thing) in (str, int, float, bool)
        return thing
    return plain(torch.load(path, weights_only=True))


def wait(running, ready):
    """Wait until ready() or the end; what it looks at may not be there yet."""
    while running.process.is_alive():
        try:
            if ready():
                return
        except OSError:
            pass
        time.sleep(0.0003)


def files(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()
            if path.name not in ("out", "err")}


def half_saved(folder):
    return any(name.endswith(".part") for name in os.listdir(folder))


def refused(script, folder, **numbers):
    """A run that ends with status 2 and one line, before training, and leaves all as it was."""
    before = files(folder)
    done = start(script, folder, **numbers).end()
    assert done.status == 2 and re.fullmatch(r"gpt\.py: error: \S.+\n", done.stderr), done.stderr
    assert "step 0" not in done.stdout and files(folder) == before
    return done.stderr


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A copy of gpt.py, beside an input.txt that is short."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "input.txt").write_text(TEXT[:1000], encoding="utf-8")
    return shutil.copy(ROOT / "gpt.py", folder)


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """The run that nothing interrupts."""
    return finish(script, tmp_path_factory.mktemp("whole"), **NUMBERS)


@pytest.fixture(scope="module")
def overfit(script, tmp_path_factory):
    """A run whose best model is not its last one."""
    return finish(script, tmp_path_factory.mktemp("overfit"), **OVERFIT)


def test_the_best_model_is_kept_and_writes_at_once(script, overfit, tmp_path):
    """With neither text nor network: the sample of the run that made it."""
    best = min(overfit.losses, key=lambda step: overfit.losses[step][1])
    assert 0 < best < 100 and overfit.kept["best"]["step"] == best, overfit.losses
    (tmp_path / "text.txt").write_text(TEXT[:1000], encoding="utf-8")
    space = names("gpt.py", tmp_path, load=overfit.path, text_file="text.txt",
                  n_layer=1, batch_size=32, max_iters=100)
    measured = space["estimate_loss"](space["val_data"])
    assert measured == pytest.approx(overfit.losses[best][1], abs=1e-4)

    before, lonely, empty = overfit.path.read_bytes(), tmp_path / "lonely", tmp_path / "empty"
    lonely.mkdir()
    done = finish(shutil.copy(ROOT / "gpt.py", lonely), empty, load=overfit.path)
    assert done.losses == {} and done.sample == overfit.sample
    assert overfit.path.read_bytes() == before and not files(empty) and len(files(lonely)) == 1
    done = finish(script, empty, **OVERFIT | {"save": ""})  # without a file, it is in memory
    assert done.sample == overfit.sample and not files(empty)


def go_on(script, folder, whole):
    """Go on after a kill, or start again if nothing had been saved: the end is the same."""
    done = finish(script, folder, **{"load": "gpt.pt"} if "gpt.pt" in files(folder) else NUMBERS)
    assert done.kept == whole.kept and done.sample == whole.sample
    assert all(whole.losses[step] == losses for step, losses in done.losses.items())


def test_killed_anywhere_it_ends_as_if_it_had_not_been(script, whole, tmp_path):
    """SIGKILL at 20 moments all over the run."""
    begin, length, statuses, saved = whole.stdout.index("step 0"), len(whole.stdout), [], 0
    for number in range(20):
        folder = tmp_path / str(number)
        running, size = start(script, folder, **NUMBERS), begin + (length - begin) * number / 20
        wait(running, lambda: (folder / "out").stat().st_size >= size)
        running.process.kill()
        statuses.append(running.end().status)
        saved += "gpt.pt" in files(folder)
        go_on(script, folder, whole)
    assert set(statuses) <= {0, -9} and statuses.count(-9) >= 15 and saved > 5


def test_killed_while_saving_the_file_is_whole(script, whole, tmp_path):
    """The old file or the new one, with a part of a new one beside it."""
    halves = 0
    for number in range(40):
        folder = tmp_path / str(number)
        running = start(script, folder, **NUMBERS)
        if number % 2:
            wait(running, (folder / "gpt.pt").exists)
        wait(running, lambda: half_saved(folder))
        running.process.kill()
        running.end()
        if half_saved(folder):
            go_on(script, folder, whole)
            halves += 1
            if halves == 4:
                return
    assert halves == 4


def in_training(script, folder):
    """A run that is somewhere between steps 100 and 200."""
    running = start(script, folder, **LONG)
    wait(running, (folder / "gpt.pt").exists)
    time.sleep(0.05)
    return running


def test_ctrl_c_ends_between_two_steps_and_load_goes_on(script, tmp_path):
    whole, running = finish(script, tmp_path / "a", **LONG), in_training(script, tmp_path / "b")
    os.kill(running.pid, signal.SIGINT)
    done = result(running)
    last = max(done.losses)
    assert 100 < last < 200 and done.kept["step"] == last and len(done.sample) > 5
    assert "stopped by Ctrl-C; --load=gpt.pt goes on\n" in done.stdout
    more = finish(script, tmp_path / "b", load="gpt.pt")
    assert more.losses == {last: done.losses[last], 200: whole.losses[200]}
    assert more.kept["step"] == 200 and set(files(tmp_path / "b")) == {"gpt.pt"}
    assert all(more.kept[part] == whole.kept[part] for part in ("model", "optimizers"))


def test_ctrl_c_twice_ends_at_once(script, tmp_path):
    """The second time while it writes after the last evaluation, or while it saves."""
    running = in_training(script, tmp_path / "writing")
    os.kill(running.pid, signal.SIGINT)
    wait(running, lambda: (running.folder / "out").read_text().count("\nstep ") == 3)
    os.kill(running.pid, signal.SIGINT)
    assert running.end().status == 130 and running.stderr == ""
    assert "sample 1" not in running.stdout and "stopped" not in running.stdout
    statuses = []
    for number in range(5):
        saving = start(script, tmp_path / str(number), **NUMBERS)
        wait(saving, lambda: half_saved(saving.folder))
        for _ in range(2):
            os.kill(saving.pid, signal.SIGINT)
            time.sleep(0.001)
        statuses.append(saving.end().status)
        assert saving.stderr == "" and set(files(saving.folder)) <= {"gpt.pt"}
    assert 130 in statuses
    assert all(load(path) for path in tmp_path.glob("*/gpt.pt"))


@pytest.mark.parametrize("moment", ["characters", "step 0"])
def test_ctrl_c_before_the_first_step_leaves_all_as_it_was(script, whole, tmp_path, moment):
    shutil.copy(whole.path, tmp_path)
    before, running = files(tmp_path), start(script, tmp_path, **NUMBERS)
    wait(running, lambda: moment in (tmp_path / "out").read_text())
    os.kill(running.pid, signal.SIGINT)
    assert running.end().status == 130 and running.stderr == "" and files(tmp_path) == before


def test_ctrl_c_ends_a_notebook_whose_cells_ran_twice():
    """The second time, the first run's handler may still be there, if a cell failed meanwhile."""
    cell = (ROOT / "gpt.py").read_text(encoding="utf-8").split("## Extra: Ctrl-C")[1]
    cell, space = re.split(r"(?m)^# %%.*$", cell)[1], {"signal": signal, "losses": {}}
    before = signal.getsignal(signal.SIGINT)
    try:
        for _ in range(3):
            exec(cell, space)
            signal.signal(signal.SIGINT, space["on_ctrl_c"])
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("pressed, made, evaluated, said", [
    (2, [1, 2], [2], "stopped by Ctrl-C; --load=gpt.pt goes on\n"),  # between two evaluations
    (3, [1, 2, 3], [], "stopped by Ctrl-C; --load=gpt.pt goes on\n"),  # this one is evaluated
    (4, [1, 2, 3, 4], [], "")])  # in the last step, nothing is left to go on with
def test_the_steps_end_after_ctrl_c(pressed, made, evaluated, said, capsys):
    cell = (ROOT / "gpt.py").read_text(encoding="utf-8").split("## Extra: Ctrl-C")[1]
    kept, steps = [], []
    space = {"signal": signal, "losses": {3: (1, 1), 4: (1, 1)}, "world": 1, "max_iters": 4,
             "save": "gpt.pt", "another_text": False, "evaluate": kept.append, "keep": kept.append}
    before = signal.getsignal(signal.SIGINT)
    try:
        exec(re.split(r"(?m)^# %%.*$", cell)[1], space)
        for step in space["until_ctrl_c"](range(1, 5)):
            steps.append(step)
            if step == pressed:
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # the second one is as usual again
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == made and kept == 2 * evaluated
    assert capsys.readouterr().out == said


def test_another_text_begins_with_the_best_weights_and_new_rows(script, overfit, tmp_path):
    text, source, before = tmp_path / "other.txt", overfit.path, overfit.path.read_bytes()
    text.write_text(OTHER, encoding="utf-8")
    new = sorted(set(OTHER) - set(overfit.kept["chars"]))
    assert {*'"(1'} < set(new)
    numbers = {"load": source, "text_file": text, "n_layer": 1}
    fresh = names("gpt.py", tmp_path, **numbers, max_iters=0)["model"].state_dict()
    best = torch.load(source, weights_only=True)["best"]["weights"]
    assert all(torch.equal(weight[:len(best[name])], best[name]) for name, weight in fresh.items())
    assert len(fresh["lm_head.weight"]) == len(overfit.kept["chars"]) + len(new)

    done = finish(script, tmp_path, load=source, text_file="other.txt", learning_rate=0.01)
    assert f"{len(new)} new characters" in done.stdout and "saved as other.pt" in done.stdout
    assert source.read_bytes() == before and set(files(tmp_path)) >= {"other.txt", "other.pt"}
    assert list(done.losses) == list(range(0, 101, 5)) and done.losses[100][0] < done.losses[0][0]
    kept, lowest = load(tmp_path / "other.pt"), min(val for train, val in done.losses.values())
    assert kept["chars"] == overfit.kept["chars"] + new and kept["step"] == 100
    assert overfit.kept["best"]["val_loss"] < kept["best"]["val_loss"]
    assert kept["best"]["val_loss"] == pytest.approx(lowest, abs=1e-4)
    assert finish(script, tmp_path, load="other.pt", prompt='"(').sample.startswith('"(')


@pytest.mark.parametrize("save", [{}, {"save": "other.pt"}])
def test_another_text_never_overwrites_its_source(script, whole, tmp_path, save):
    shutil.copy(whole.path, tmp_path / "other.pt")
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    finish(script, tmp_path, load="other.pt", text_file="other.txt", **save)
    assert load(tmp_path / "other.pt")["chars"] != whole.kept["chars"]
    assert whole.path.read_bytes() in [path.read_bytes() for path in tmp_path.glob("*.pt")]


def edited(script, folder, *changes):
    """A copy of the script in which each (old, new) is changed, and of its input.txt."""
    shutil.copytree(os.path.dirname(script), folder)
    source = (folder / "gpt.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source
        source = source.replace(old, new, 1)
    (folder / "gpt.py").write_text(source, encoding="utf-8")
    return folder / "gpt.py"


def test_the_command_line_before_the_checkpoint_before_the_block(script, whole, tmp_path):
    """And what was changed in the block counts as given; with more steps, it goes on."""
    shutil.copy(whole.path, tmp_path)
    done = finish(script, tmp_path, load="gpt.pt", max_new_tokens=9)
    assert len(done.sample) == 9 + 1 and done.sample[:5] == whole.sample[:5]
    other = edited(script, tmp_path / "copy", ("\nmax_iters = 1500", "\nmax_iters = 15"),
                   ("\ntemperature = 0.8", "\ntemperature = 0.1"), ("\ntop_k = 0", "\ntop_k = 5"))
    done = finish(other, tmp_path, load="gpt.pt", top_k=3)
    changed = {"temperature": 0.1, "max_iters": 15, "top_k": 3}
    assert done.kept["settings"] == whole.kept["settings"] | changed
    assert list(done.losses) == [12, 15] and done.losses[12] == whole.losses[12]
    assert "12 of 15 steps" in done.stdout and done.kept["step"] == 15


def test_a_model_made_on_a_gpu_is_loaded_on_a_cpu(script, whole, tmp_path):
    gpu = edited(script, tmp_path / "copy", *GPU)
    assert finish(gpu, tmp_path, **NUMBERS).kept["settings"] == whole.kept["settings"]
    assert finish(script, tmp_path, load="gpt.pt").sample == whole.sample


def test_what_is_changed_in_the_numbers_for_a_gpu_counts_as_given(script, tmp_path):
    """On what it takes for a GPU, as above; the numbers that have not changed are the file's."""
    play = [*GPU, ('"n_embd": 384', '"n_embd": 24'), ('"n_layer": 6', '"n_layer": 1')]
    gpu = edited(script, tmp_path / "a", *play, ('"max_iters": 1000', '"max_iters": 2'))
    first = finish(gpu, tmp_path, block_size=16, eval_interval=2)
    more = edited(script, tmp_path / "b", *play, ('"max_iters": 1000', '"max_iters": 4'))
    done = finish(more, tmp_path, load="gpt.pt", max_new_tokens=9)
    changed = {"max_iters": 4, "max_new_tokens": 9}
    assert done.kept["settings"] == first.kept["settings"] | changed
    assert list(done.losses) == [2, 4]
    # On a CPU, they make no difference.
    cpu = edited(script, tmp_path / "c", ('"n_embd": 384', '"n_embd": 512'))
    done = finish(script, tmp_path, **NUMBERS | {"save": "cpu.pt"})
    assert finish(cpu, tmp_path, load="cpu.pt").sample == done.sample


def test_an_earlier_model_is_moved_and_named(script, whole, overfit, tmp_path):
    shutil.copy(overfit.path, tmp_path)
    for number in (1, 2):
        done = finish(script, tmp_path, **NUMBERS)
        assert done.stdout.count(f"gpt.pt is now gpt.{number}.pt\n") == 1
        assert done.stdout.count(" is now ") == 1 and done.kept == whole.kept
    assert (tmp_path / "gpt.1.pt").read_bytes() == overfit.path.read_bytes()
    assert set(files(tmp_path)) == {"gpt.pt", "gpt.1.pt", "gpt.2.pt"}


def test_a_model_that_another_run_saves_meanwhile_is_moved_too(script, overfit, tmp_path):
    running = in_training(script, tmp_path)
    shutil.copy(overfit.path, tmp_path)
    done = result(running)
    assert done.kept["step"] == 200 and "gpt.pt is now gpt.1.pt\n" in done.stdout
    assert (tmp_path / "gpt.1.pt").read_bytes() == overfit.path.read_bytes()


def test_another_block_size_is_measured_anew_or_refused(script, whole, tmp_path):
    """The positions of part one depend on it; part two knows distances only."""
    shutil.copy(whole.path, tmp_path)
    done = finish(script, tmp_path, load="gpt.pt", block_size=8)
    assert list(done.losses) == [12] and done.losses[12] != whole.losses[12]
    finish(script, tmp_path, **NUMBERS | {"part": 1, "max_iters": 3, "save": "one.pt"})
    assert "one.pt" in refused(script, tmp_path, load="one.pt", block_size=8)


class Code:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def spoil(kind, source, path):
    """Write to path what is no checkpoint, or was one."""
    checkpoint = torch.load(source, weights_only=True)
    weight = checkpoint["best"]["weights"]["lm_head.weight"]
    data = bytearray(source.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 9] ^= 1
    whole = {"flipped": data, "truncated": source.read_bytes()[:len(data) // 2], "empty": b"",
             "text": b"Once upon a time\n", "pickle": pickle.dumps(Code())}
    if kind in whole:
        return path.write_bytes(whole[kind])
    if kind == "nan":
        weight[3, 3] = math.nan
    checkpoint |= {"code": {"chars": Code()}, "setting": {"settings": checkpoint["settings"] | {
        "max_iters": "9"}}}.get(kind, {})
    checkpoint.pop(kind, None)
    torch.save(weight if kind == "tensor" else checkpoint, path)


@pytest.mark.parametrize("kind", [
    "flipped", "truncated", "empty", "text", "pickle", "nan", "code", "setting", "tensor",
    "settings", "as_written", "model", "optimizers", "step", "best", "losses", "chars", "excerpt",
    "text_sha256"])  # from settings on: this part is missing
def test_what_is_no_checkpoint_is_refused_in_one_line(script, whole, tmp_path, kind):
    """To be loaded, or to be replaced: it is left as it is, and its code does not run."""
    spoil(kind, whole.path, tmp_path / "bad.pt")
    assert "bad.pt" in refused(script, tmp_path, load="bad.pt")
    if kind in ("truncated", "text"):
        assert "bad.pt" in refused(script, tmp_path, **NUMBERS | {"save": "bad.pt"})


def test_what_is_missing_or_does_not_fit_is_refused(script, whole, tmp_path):
    shutil.copy(whole.path, tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("folder", "missing/gpt.pt"):
        assert path in refused(script, tmp_path, **NUMBERS | {"save": path})
        assert path in refused(script, tmp_path, load=path)
    for name, value in {"n_embd": 32, "n_layer": 2, "n_head": 1, "part": 1}.items():
        assert "gpt.pt" in refused(script, tmp_path, load="gpt.pt", **{name: value})
    # Both parts have weights of the same names and shapes, which mean different things.
    other = {"text_file": ROOT / "input.txt", "part": 1}
    assert "gpt.pt" in refused(script, tmp_path, load="gpt.pt", **other)
    # An unfinished run must not go on with a text that it has not begun with.
    assert "text" in refused(ROOT / "gpt.py", tmp_path, load="gpt.pt", max_iters=14)


def test_a_full_disk_while_saving_leaves_the_old_file_whole(whole, tmp_path, small_text):
    resource = pytest.importorskip("resource")
    shutil.copy(whole.path, tmp_path)
    before = files(tmp_path)
    done = run(ROOT / "gpt.py", "--save=gpt.pt", "--max_iters=5", f"--text_file={small_text}",
               cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    assert done.returncode == 2 and files(tmp_path) == before
    assert re.fullmatch(r"gpt\.py: error: cannot write gpt\.pt \(.+\)\n", done.stderr)
