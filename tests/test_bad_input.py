"""Bad input: one clear line, exit status 2, no traceback, no training, and no file touched."""
import re
import sys

import pytest
import torch
from conftest import ROOT, TEXT, Quick

CASES = [  # arguments, and what the one line must say
    ("--n_layers=3", "unrecognized arguments: --n_layers=3"),
    ("n_layer=3", "unrecognized arguments: n_layer=3"),
    ("--max_iter=3", "unrecognized arguments: --max_iter=3"),
    ("--n_layer", r".*--n_layer.*expected one argument"),
    ("--max_iters=many", r".*max_iters.*int.*'many'"),
    ("--max_iters=2.5", r".*max_iters.*int.*'2\.5'"),
    ("--dropout=half", r".*dropout.*float.*'half'"),
    ("--batch_size=0", r"batch_size=0 should be at least 1, .*"),
    ("--block_size=-1", r"block_size=-1 should be at least 1, .*"),
    ("--n_embd=0", r"n_embd=0 should be at least 1, .*"),
    ("--n_head=0", r"n_head=0 should be at least 1, .*"),
    ("--n_layer=-2", r"n_layer=-2 should be at least 1, .*"),
    ("--eval_interval=0", r"eval_interval=0 should be at least 1, .*"),
    ("--max_iters=-1", r"max_iters=-1 should be at least 0, .*"),
    ("--samples=-1", r"samples=-1 should be at least 0, .*"),
    ("--max_new_tokens=-1", r"max_new_tokens=-1 should be at least 0, .*"),
    ("--top_k=-1", r"top_k=-1 should be at least 0, .*"),
    ("--seed=-1", r"seed=-1 should be at least 0, .*"),
    ("--learning_rate=-1", r"learning_rate=-1\.0 should be at least 0, .*"),
    ("--temperature=-1", r"temperature=-1\.0 should be at least 0, .*"),
    ("--dropout=-0.1", r"dropout=-0\.1 should be at least 0, .*"),
    ("--dropout=nan", r"dropout=nan should be .*"),
    ("--temperature=nan", r"temperature=nan should be .*"),
    ("--learning_rate=inf", r"learning_rate=inf should be .*"),
    ("--muon_lr=inf", r"muon_lr=inf should be .*"),
    ("--momentum=1", r".*momentum=1\.0.*"),
    ("--weight_decay=nan", r"weight_decay=nan should be .*"),
    (f"--seed={2**63}", rf"seed={2**63} should be .*"),
    (f"--n_embd={2**63}", rf"n_embd={2**63} should be .*"),
    (f"--batch_size={2**63}", rf"batch_size={2**63} should be .*"),
    (f"--max_iters={2**63}", rf"max_iters={2**63} should be .*"),
    ("--n_embd=60000", r"too large for any memory; .*"),
    ("--n_layer=99999999", r"too large for any memory; .*"),
    ("--dropout=1", r".*dropout=1\.0.*"),
    ("--dropout=1.5", r".*dropout=1\.5.*"),
    ("--n_head=3", r".*n_embd=16.*"),              # 16 is no multiple of 3
    ("--n_head=3 --part=1", r".*n_embd=16.*"),
    ("--n_head=16", r".*n_embd=16.*"),             # heads of 1 have no pairs to turn
    ("--n_embd=12 --n_head=4", r".*n_embd=12.*"),  # heads of 3: one number without a partner
    ("--n_embd=18", r".*n_embd=18.*"),             # no quarter to shift
    ("--part=3", r".*part=3.*"),
    ("--dtype=float16", r".*dtype='?float16.*bfloat16.*"),
    ("--device=abacus", r".*device='?abacus.*"),
    ("--text_file=nowhere.txt", r".*nowhere\.txt.*No such file.*"),
    ("--text_file=folder", r".*folder.*directory.*"),
    ("--text_file=latin.txt", r".*UTF-8.*latin\.txt.*"),
    ("--text_file=empty.txt", r"empty\.txt has 0 characters.*should have 170 or more"),
    ("--text_file=short.txt", r"short\.txt has 100 characters.*should have 170 or more"),
    ("--block_size=5000", r"good\.txt has 20,?000 characters.*5000.*should have 50,?010 or more"),
    ("--prompt=\N{SNOWMAN}", r"prompt='\N{SNOWMAN}' has characters that are not in the text"),
    ("--load=nowhere.pt", r".*no file nowhere\.pt"),
    ("--load=folder", r".*folder.*"),
    ("--load=short.txt", r"short\.txt is no checkpoint.*"),
    ("--load=empty.txt", r"empty\.txt is no checkpoint.*"),
    ("--load=other.pt", r"other\.pt is no checkpoint.*"),
    ("--block_size=32768", r"block_size=32768 should be at least 1, and below 32768"),
    ("--save=good.txt/gpt.pt", r".*save='?good\.txt/gpt\.pt.*folder.*"),
    ("--save=nowhere/gpt.pt", r".*save='?nowhere/gpt\.pt.*folder.*"),
    ("--save=folder", r".*folder.*"),
    ("--save=short.txt", r"short\.txt is no checkpoint.*"),
    ("--save=other.pt", r"other\.pt is no checkpoint.*"),
]
if not torch.cuda.is_available():
    CASES += [("--device=cuda", r".*device='?cuda.*")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with texts and files that are none."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.txt").write_text(TEXT[:20000], encoding="utf-8")
    (folder / "short.txt").write_text(TEXT[:100], encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Café".encode("latin-1") * 999)
    (folder / "folder").mkdir()
    torch.save([1, 2, 3], folder / "other.pt")
    return folder


def complaint(folder, *args, script="gpt.py"):
    """Run a script; return what it complains of in one line, after checking its manners."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run = Quick(ROOT / script, "--text_file=good.txt", "--max_iters=5", *args, cwd=folder).end()
    assert run.status == 2, run.stderr[-500:]
    found = re.fullmatch(rf"{script}: error: (.+)\n", run.stderr)
    assert found, run.stderr
    assert not re.search("(?m)^(step|---)", run.stdout)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    return found[1]


@pytest.mark.parametrize("args, line", CASES, ids=[args for args, _ in CASES])
def test_one_line_and_status_2(args, line, folder):
    assert re.fullmatch(line, complaint(folder, *args.split(" ")))


@pytest.mark.parametrize("script", ["gpt.py", "bigram.py"])
@pytest.mark.parametrize("name, value, line", [
    ("max_iters", "1e3", "max_iters=1000.0 should be of type int"),
    ("block_size", '"64"', "block_size='64' should be of type int"),
    ("samples", "2.0", "samples=2.0 should be of type int"),
    ("seed", "True", "seed=True should be of type int"),
    ("top_k", "None", "top_k=None should be of type int"),
    ("learning_rate", '"0.1"', "learning_rate='0.1' should be of type float"),
    ("prompt", "None", "prompt=None should be of type str"),
    ("eval_interval", "0", "eval_interval=0 should be at least 1.*"),
    ("temperature", "-1", "temperature=-1 should be at least 0.*")])
def test_wrong_numbers_written_into_the_script(script, name, value, line, tmp_path):
    source = (ROOT / script).read_text(encoding="utf-8")
    source, count = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", source)
    (tmp_path / script).write_text(source, encoding="utf-8")
    run = Quick(tmp_path / script, cwd=tmp_path, tiny=False).end()
    assert count == 1 and (run.status, run.stdout) == (2, "")
    assert re.fullmatch(rf"{script}: error: {line}\n", run.stderr), run.stderr


@pytest.mark.parametrize("script", ["gpt.py", "bigram.py"])
def test_a_number_without_its_comment_is_still_an_option_and_checked(script, tmp_path):
    source = (ROOT / script).read_text(encoding="utf-8")
    for value, option, line in [("20.0", "--seed=1", "max_iters=20.0 should be of type int"),
                                ("20", "--max_iters=-1", "max_iters=-1 should be at least 0.*")]:
        changed = re.sub("(?m)^max_iters = .*", f"max_iters = {value}", source)
        (tmp_path / script).write_text(changed, encoding="utf-8")
        run = Quick(tmp_path / script, option, cwd=tmp_path, tiny=False).end()
        assert (run.status, run.stdout) == (2, "")
        assert re.fullmatch(rf"{script}: error: {line}\n", run.stderr), run.stderr


@pytest.mark.parametrize("args", ["--n_layer=3", "--batch_sizes=3", "--max_iters=2.5",
                                  "--text_file=empty.txt", "--prompt=\N{SNOWMAN}"])
def test_bigram_complains_as_well(args, folder):
    name, value = args.strip("-").split("=")
    said = complaint(folder, args, script="bigram.py")
    assert value in said or name in said


@pytest.mark.parametrize("args", ["--n_head=8", "--n_head=1", "--n_embd=20", "--batch_size=3000",
                                  "--block_size=1", "--block_size=2",
                                  "--top_k=99 --temperature=0", f"--seed={2**31 - 1}"])
def test_unusual_numbers_that_work(args, folder):
    run = Quick(ROOT / "gpt.py", "--text_file=good.txt", *args.split(" "), "--max_iters=2",
                cwd=folder).end()
    assert (run.status, run.stderr) == (0, ""), run.stderr
    assert "step 2: " in run.stdout


@pytest.mark.parametrize("steps", [5, 90])
def test_a_loss_that_is_no_number_ends_the_run_and_is_not_kept(steps, folder, tmp_path):
    run = Quick(ROOT / "gpt.py", f"--text_file={folder / 'good.txt'}", f"--max_iters={steps}",
                f"--eval_interval={steps}", "--learning_rate=1e9", "--muon_lr=1e9",
                "--save=gpt.pt", cwd=tmp_path).end()
    assert run.status == 2, run.stderr[-500:]
    assert re.fullmatch(r"gpt\.py: error: the loss is .*rates *\n", run.stderr)
    assert "step 0: " in run.stdout and "--- sample" not in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory that is kept")
@pytest.mark.parametrize("text, number, limit", [
    ("good.txt", "batch_size=200000", 6), ("long.txt", "block_size=20000", 7)])
def test_out_of_memory_is_one_line(text, number, limit, folder, tmp_path):
    """With pieces of 20,000 characters, the evaluation before the training needs too much."""
    resource = pytest.importorskip("resource")
    (folder / "long.txt").write_text((folder / "good.txt").read_text() * 11)
    run = Quick(ROOT / "gpt.py", f"--text_file={folder / text}", f"--{number}",
                "--max_iters=1", cwd=tmp_path)
    resource.prlimit(run.pid, resource.RLIMIT_AS, 2 * (limit * 2**30,))
    assert run.end().status == 2, run.stderr[-500:]
    assert re.fullmatch(rf"gpt\.py: error: out of memory; .*{number}.*\n", run.stderr)
    assert ("step 0: " in run.stdout) == number.startswith("batch")
    assert "--- sample" not in run.stdout
