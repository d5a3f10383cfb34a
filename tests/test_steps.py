"""The series of patches is true: it leads from bigram.py to gpt.py, and each step runs."""
import json
import re

import pytest
from conftest import GPT, ROOT, play, run

import steps

SCRIPTS = steps.scripts()
NAMES = [name for name in SCRIPTS if name[0].isdigit()]
LOSSES = json.loads(steps.LOSSES.read_text())


def mean(name):
    return sum(LOSSES[name].values()) / len(LOSSES[name])


def test_the_series_ends_as_gpt_to_the_byte():
    assert SCRIPTS[NAMES[-1]] == GPT
    assert NAMES[0] == "00_bigram.py" and SCRIPTS[NAMES[0]] != GPT


def test_a_patch_that_does_not_fit_is_refused():
    patch = steps.patches()[0].read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="line 1[0-9]* is"):
        steps.apply(patch, "\n".join(["x"] * 400))


def test_patches_are_made_anew_from_the_scripts(tmp_path, monkeypatch):
    """What was changed in a script is in its patch, and in gpt.py; the messages stay."""
    for name, source in SCRIPTS.items():
        source = source.replace("torch.manual_seed(seed)\nmodel", "torch.manual_seed(7)\nmodel")
        (tmp_path / name).write_text(source, encoding="utf-8")
    copy = tmp_path / "copy"
    (copy / "tests" / "steps").mkdir(parents=True)
    for path in steps.FOLDER.glob("*.patch"):
        (copy / "tests" / "steps" / path.name).write_text(path.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(steps, "ROOT", copy)
    monkeypatch.setattr(steps, "FOLDER", copy / "tests" / "steps")
    steps.save(tmp_path)
    made = steps.scripts()
    assert list(made) == list(SCRIPTS) and "torch.manual_seed(7)\nmodel" in made[NAMES[-1]]
    assert (copy / "gpt.py").read_text(encoding="utf-8") == made[NAMES[-1]]
    old, new = ((folder / "tests" / "steps" / "03-positions.patch").read_text("utf-8")
                .split("\n--- ")[0] for folder in (ROOT, copy))
    assert old == new and "turn" in new


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_each_step_runs(name, series, tmp_path):
    done = play(series / name, tmp_path, max_iters=2, eval_interval=1)
    assert done.status == 0 and done.losses.keys() == {0, 1, 2}, done.err
    assert done.losses[2] < done.losses[0]


def test_each_step_is_small_and_gains():
    """At most 30 lines of code; all but embedding and attention alone gain, by the mean."""
    for before, name in zip(NAMES, NAMES[1:-1]):
        assert steps.added(SCRIPTS[before], SCRIPTS[name]) <= 30
        old, new = (mean(n[3:-3].replace("_", "-")) for n in (before, name))
        assert new < old or name in ("01_embedding.py", "02_attention.py"), (name, old, new)


def test_the_losses_quoted_are_those_that_were_measured():
    """In gpt.py, in the messages of the patches, and in the table of the README."""
    titles = re.findall(r"(?ms)^# ## Step (\d+): .+?(?=^# ##? |\Z)", GPT)
    assert list(map(int, titles)) == list(range(1, len(NAMES) - 1))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, (before, name) in enumerate(zip(NAMES, NAMES[1:-1]), start=1):
        old, new = (mean(n[3:-3].replace("_", "-")) for n in (before, name))
        part = re.search(rf"(?ms)^# ## Step {number}: .+?(?=^# ##? |\Z)", GPT)[0]
        assert f"({new:.2f})" in part, (number, new)
        message = steps.patches()[number - 1].read_text(encoding="utf-8").split("\n--- ")[0]
        assert f"{old:.2f} before, {new:.2f} after" in message
    assert steps.table() in readme


def test_every_option_in_the_readme_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = re.sub(r"(python (tests|-m)|torchrun)[^`]*", "", readme)  # not those of other programs
    told = set(re.findall(r"--(\w+)=", ours))
    assert {"prompt", "samples", "max_iters"} < told
    assert all(re.search(rf"(?m)^{name} = ", GPT) for name in told), told


def test_steps_shows_a_patch(tmp_path):
    said = run(ROOT / "tests" / "steps.py", "--show=3", cwd=tmp_path).stdout
    assert said.startswith("Step 3") and "+        q, k = rotate(q), rotate(k)" in said
