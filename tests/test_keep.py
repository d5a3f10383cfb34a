"""gpt.py keeps its best model: nothing is lost or overwritten, and a run can go on."""
import math
import re
import shutil

import pytest
import torch
from conftest import GPT, TEXT, play

NUMBERS = {"max_iters": 20, "dropout": 0.2, "n_layer": 1}
OTHER = TEXT[20000:40000].replace("e", "é") + '"(12.50)"'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the end of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, play("gpt.py", folder, **NUMBERS)


def kept(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two parts of a checkpoint are equal, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}


def press(moment):
    """A function that presses Ctrl-C as soon as moment is printed."""
    def stop(line):
        if moment in line:
            raise KeyboardInterrupt
    return stop


def test_a_finished_model_writes_at_once(whole, tmp_path):
    folder, done = whole
    assert done.losses.keys() == {0, 5, 10, 15, 20} and "saved as gpt.pt" in done.out
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    again = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_new_tokens=5", tiny=False)
    assert again.losses == {} and again.sample == done.sample and files(tmp_path) == before
    longer = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_new_tokens=9", tiny=False)
    assert longer.sample[:5] == done.sample[:5] and len(longer.sample) == 10


def test_going_on_after_ctrl_c_is_as_if_it_had_not_been(whole, tmp_path):
    stopped = play("gpt.py", tmp_path, stop=press("step 15: "), **NUMBERS)
    assert stopped.status == 0 and "\nstopped; --load=gpt.pt goes on from step 10\n" in stopped.out
    assert kept(tmp_path / "gpt.pt")["step"] == 10 and len(stopped.sample) == 6
    done = play("gpt.py", tmp_path, "--load=gpt.pt", tiny=False)
    assert done.losses.keys() == {10, 15, 20} and done.sample == whole[1].sample
    a, b = kept(tmp_path / "gpt.pt"), kept(whole[0] / "gpt.pt")
    assert same(a, b)
    assert set(files(tmp_path)) == {"gpt.pt", "input.txt"}


def test_ctrl_c_before_the_first_evaluation_says_that_nothing_is_kept(tmp_path):
    done = play("gpt.py", tmp_path, stop=press("step 10 of 20"), eval_interval=20, max_iters=20)
    assert done.status == 0 and "nothing was saved" in done.out and set(files(tmp_path)) == {
        "input.txt"}


def test_a_longer_run_that_was_interrupted_goes_on(whole, tmp_path):
    """Also if it has not been better than before it was made longer."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    long = ["--load=gpt.pt", "--max_iters=60", "--eval_interval=10", "--learning_rate=1.0",
            "--muon_lr=5.0"]
    stopped = play("gpt.py", tmp_path, *long, tiny=False, stop=press("step 50: "))
    assert "goes on from step 20" in stopped.out and stopped.losses[30] > stopped.losses[20]
    done = play("gpt.py", tmp_path, "--load=gpt.pt", tiny=False)
    assert done.losses.keys() == {20, 30, 40, 50, 60}
    assert done.losses[40] == stopped.losses[40]


def test_the_best_model_is_kept_and_a_run_that_got_worse_is_finished(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT[:1000], encoding="utf-8")
    done = play("gpt.py", tmp_path, max_iters=60, batch_size=32, learning_rate=0.02, muon_lr=0.1)
    losses = {step: loss for step, loss in done.losses.items() if step}
    best = min(losses, key=losses.get)
    assert best < 60 and kept(tmp_path / "gpt.pt")["step"] == best
    space = done.space
    assert space["estimate_loss"](space["val_data"]) == pytest.approx(losses[best], abs=1e-3)
    again = play("gpt.py", tmp_path, "--load=gpt.pt", tiny=False)
    assert again.losses == {} and again.sample == done.sample
    more = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_iters=65", tiny=False)
    assert min(more.losses) == best and max(more.losses) == 65


def test_step_0_is_never_kept(tmp_path):
    """Even where the validation loss rises from the start."""
    (tmp_path / "input.txt").write_text("ab" * 450 + "abcdefghijklmnopqrst" * 5)
    done = play("gpt.py", tmp_path, max_iters=20, learning_rate=0.1, muon_lr=0.2)
    assert min(done.losses, key=done.losses.get) == 0 and kept(tmp_path / "gpt.pt")["step"] > 0


def test_going_on_for_longer_and_with_other_numbers(whole, tmp_path):
    """What is given counts; all else is the checkpoint's."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    done = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_iters=30", "--eval_interval=10",
                tiny=False)
    assert done.losses.keys() == {20, 30} and done.losses[20] == whole[1].losses[20]
    space = done.space
    assert (space["dropout"], space["n_embd"], space["max_iters"]) == (0.2, 16, 30)
    assert space["losses"].keys() == {0, 5, 10, 15, 20, 30}  # the picture shows all of them


def test_another_shape_is_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    for name, value in {"block_size": 8, "n_embd": 32, "n_head": 1, "n_layer": 2}.items():
        done = play("gpt.py", tmp_path, "--load=gpt.pt", f"--{name}={value}", tiny=False)
        old = whole[1].space[name]
        assert done.status == 2 and done.err == (
            f"gpt.py: error: gpt.pt was made with {name}={old}\n")
    assert files(tmp_path) == before


def test_a_new_run_takes_the_next_free_name(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "gpt.pt").read_bytes()
    assert "saved as gpt2.pt\n" in play("gpt.py", tmp_path, **NUMBERS).out
    assert "saved as gpt3.pt\n" in play("gpt.py", tmp_path, **NUMBERS, seed=1).out
    assert "saved as gpt4.pt\n" in play("gpt.py", tmp_path, "--load=gpt2.pt", "--save=gpt.pt",
                                       "--max_iters=25", tiny=False).out
    assert (tmp_path / "gpt.pt").read_bytes() == before
    assert not same(kept(tmp_path / "gpt3.pt")["model"], kept(tmp_path / "gpt2.pt")["model"])


def test_two_runs_in_one_folder_do_not_share_a_file(whole, tmp_path):
    """Another one writes gpt.pt while this one trains."""
    def other(line):
        if "step 0: " in line:
            shutil.copy(whole[0] / "gpt.pt", tmp_path)
    done = play("gpt.py", tmp_path, stop=other, seed=1)
    assert "saved as gpt2.pt" in done.out
    assert (tmp_path / "gpt.pt").read_bytes() == (whole[0] / "gpt.pt").read_bytes()


@pytest.mark.parametrize("save", ["gpt.pt", "new.pt"])
def test_fine_tuning_keeps_its_source_and_learns_new_characters(whole, tmp_path, save):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    source, before = kept(tmp_path / "gpt.pt"), (tmp_path / "gpt.pt").read_bytes()
    args = ["--load=gpt.pt", "--text_file=other.txt", f"--save={save}"][:3 - (save == "gpt.pt")]
    start = play("gpt.py", tmp_path, *args, "--max_iters=0", tiny=False).space
    new = sorted(set(OTHER) - set(source["chars"]))
    assert {*'"(1é'} <= set(new) and start["chars"] == source["chars"] + new
    for name, parameter in start["model"].state_dict().items():
        old = source["model"][name]
        assert torch.equal(parameter[:len(old)], old)
        for row in parameter[len(old):]:  # a finished model does not write what it never learned
            torch.testing.assert_close(row.detach(), old.mean(dim=0))
    done = play("gpt.py", tmp_path, *args, tiny=False)
    name = "gpt2.pt" if save == "gpt.pt" else "new.pt"
    assert f"saved as {name}\n" in done.out and done.losses[20] < done.losses[0]
    assert (tmp_path / "gpt.pt").read_bytes() == before
    again = play("gpt.py", tmp_path, f"--load={name}", '--prompt="(é', tiny=False)
    assert again.losses == {} and again.sample.startswith('"(é')


def test_another_text_of_the_same_name_is_not_gone_on_with(whole, tmp_path):
    """But a finished model still writes."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "input.txt").write_text(TEXT[1000:19000], encoding="utf-8")
    before = files(tmp_path)
    done = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_iters=30", tiny=False)
    assert done.status == 2 and files(tmp_path) == before
    assert re.fullmatch(r"gpt.py: error: .*gpt.pt.*a different input.txt.*\n", done.err)
    done = play("gpt.py", tmp_path, "--load=gpt.pt", tiny=False)
    assert done.sample == whole[1].sample and files(tmp_path) == before


def test_the_text_of_a_checkpoint_is_remembered(tmp_path):
    (tmp_path / "mine.txt").write_text(OTHER, encoding="utf-8")
    play("gpt.py", tmp_path, text_file="mine.txt", max_iters=5)
    done = play("gpt.py", tmp_path, "--load=gpt.pt", "--max_iters=10", tiny=False)
    assert done.losses.keys() == {5, 10} and done.space["text"] == OTHER


@pytest.mark.parametrize("when", [5, 10])
def test_a_loss_that_is_no_number_is_not_kept(when, tmp_path):
    """What was kept before stays."""
    source = GPT.replace("losses[step] = evaluate(step)",
                         "muon_lr = [p.mul_(float('nan')) for p in model.parameters() "
                         f"if step == {when} for _ in [torch.set_grad_enabled(False)]]\n"
                         "            "
                         "losses[step] = evaluate(step)")
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    with pytest.raises(RuntimeError, match="nan"):  # PyTorch's own message: it cannot write
        play(tmp_path / "edited.py", tmp_path)
    torch.set_grad_enabled(True)
    assert (tmp_path / "gpt.pt").exists() == (when > 5)
    if when == 5:
        return
    checkpoint = kept(tmp_path / "gpt.pt")
    assert checkpoint["step"] == 5 and math.isfinite(checkpoint["val_loss"])
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


def test_a_save_that_fails_leaves_the_old_file_whole(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)

    def half(thing, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        play("gpt.py", tmp_path, "--load=gpt.pt", "--max_iters=25", tiny=False)
    assert {**files(tmp_path), "gpt.pt.part": b""} == {**before, "gpt.pt.part": b""}


def test_a_prompt_needs_characters_of_the_model_only(tmp_path):
    """Not of the text: one that was saved with the model goes along to another text."""
    assert play("gpt.py", tmp_path, prompt="ROMEO:", save="a.pt").status == 0
    (tmp_path / "other.txt").write_text(TEXT[:3000].lower(), encoding="utf-8")
    done = play("gpt.py", tmp_path, load="a.pt", save="b.pt", text_file="other.txt")
    assert done.status == 0 and "\nROMEO:" in done.out
