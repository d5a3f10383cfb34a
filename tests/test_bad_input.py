"""Bad input: one clear line, exit status 2, no traceback, and no file touched."""
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TEXT, TINY, options, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with texts and checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.txt").write_text(TEXT[:20000], encoding="utf-8")
    (folder / "short.txt").write_text(TEXT[:100], encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Café".encode("latin-1") * 999)
    (folder / "snow.txt").write_text(TEXT[:9000] + "\N{SNOWMAN}" * 7, encoding="utf-8")
    (folder / "folder").mkdir()
    done = run(ROOT / "gpt.py", "--text_file=good.txt", "--save=good.pt", "--max_iters=5",
               cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "gpt.png").unlink(missing_ok=True)
    whole = (folder / "good.pt").read_bytes()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pt").write_bytes(b"to be or not to be")
    torch.save([1, 2, 3], folder / "other.pt")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(folder / "the code has run"),)
    (folder / "code.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"settings": Code()}, folder / "code2.pt")
    return folder


CASES = [  # arguments, and what the one line must say
    ("--n_layers=3", r"--n_layers=3 is not --name=value with a name out of device, .*n_layer, .*"),
    ("n_layer=3", r"n_layer=3 is not --name=value .*"),
    ("--n_layer", r"--n_layer is not --name=value .*"),
    ("more", r"more is not --name=value .*"),
    ("--max_iters=many", r"max_iters=many should be of type int"),
    ("--max_iters=2.5", r"max_iters=2.5 should be of type int"),
    ("--dropout=half", r"dropout=half should be of type float"),
    ("--batch_size=0", r"batch_size=0 should be 1 or more"),
    ("--block_size=-1", r"block_size=-1 should be 1 or more"),
    ("--n_embd=0", r"n_embd=0 should be 1 or more"),
    ("--n_head=0", r"n_head=0 should be 1 or more"),
    ("--n_layer=-2", r"n_layer=-2 should be 1 or more"),
    ("--eval_interval=0", r"eval_interval=0 should be 1 or more"),
    ("--max_iters=-1", r"max_iters=-1 should be 0 or more"),
    ("--samples=0", r"samples=0 should be 1 or more"),
    ("--max_new_tokens=-1", r"max_new_tokens=-1 should be 0 or more"),
    ("--n_head=3", r"n_embd=16 should be a multiple of 4 \* n_head = 12"),
    ("--n_embd=18 --n_head=6", r"n_embd=18 should be a multiple of 4 \* n_head = 24"),
    ("--dropout=1", r"dropout=1.0 should be below 1"),
    ("--dropout=-0.1", r"dropout=-0.1 should be 0 or more"),
    ("--dropout=nan", r"dropout=nan should be 0 or more"),
    ("--learning_rate=-1", r"learning_rate=-1.0 should be 0 or more"),
    ("--temperature=0", r"temperature=0.0 should be 0.001 or more"),
    ("--temperature=-1", r"temperature=-1.0 should be 0.001 or more"),
    ("--top_k=-1", r"top_k=-1 should be 0 or more"),
    ("--seed=-1", r"seed=-1 should be 0 or more"),
    ("--dtype=float16", r"dtype='float16' should be auto, bfloat16 or float32"),
    ("--text_file=nowhere.txt", r".*nowhere.txt.*; give the path of a text in UTF-8"),
    ("--text_file=folder", r".*folder.*; give the path of a text in UTF-8"),
    ("--text_file=empty.txt", r"text_file='empty.txt' too short for block_size=16"),
    ("--text_file=short.txt", r"text_file='short.txt' too short for block_size=16"),
    ("--text_file=latin.txt", r"text_file=latin.txt is not UTF-8; .*"),
    ("--block_size=5000", r"text_file='good.txt' too short for block_size=5000"),
    ("--device=abacus", r"device=abacus cannot be used .*; try --device=cpu"),
    ("--load=nowhere.pt", r"nowhere.pt is no model kept by gpt.py \(FileNotFoundError\)"),
    ("--load=folder", r"folder is no model kept by gpt.py .*"),
    ("--load=empty.pt", r"empty.pt is no model kept by gpt.py .*"),
    ("--resume=cut.pt", r"cut.pt is no model kept by gpt.py .*"),
    ("--load=text.pt", r"text.pt is no model kept by gpt.py .*"),
    ("--load=other.pt", r"other.pt is no model kept by gpt.py .*"),
    ("--load=code.pt", r"code.pt is no model kept by gpt.py .*"),
    ("--resume=code2.pt", r"code2.pt is no model kept by gpt.py .*"),
    ("--load=good.pt --n_layer=1", r"the model in good.pt has to keep \{.*'n_layer': 2.*\}"),
    ("--load=good.pt --text_file=snow.txt", r"'\N{SNOWMAN}' \(7 times\) not in the vocabulary, .*"),
    ("--prompt=\N{SNOWMAN}", r"'\N{SNOWMAN}' \(1 times\) not in the vocabulary, .*"),
    ("--save=nowhere/gpt.pt", r"save='nowhere/gpt.pt' has no writable folder"),
]
if not torch.cuda.is_available():
    CASES += [("--device=cuda", r"device=cuda cannot be used .*; try --device=cpu")]

FORK = """
import io, json, os, sys
import numpy, requests, torch
code = compile(open(sys.argv[1], encoding="utf-8").read(), sys.argv[1], "exec")
for line in sys.stdin:
    if not (child := os.fork()):
        sys.argv[1:] = json.loads(line)
        os.close(1), os.close(2)
        os.open("out", os.O_CREAT | os.O_WRONLY), os.open("err", os.O_CREAT | os.O_WRONLY)
        for name, number in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
        try:
            exec(code, {"__name__": "__main__", "__file__": sys.argv[0]})
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as end:
                status = end.code
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forker(folder):
    """A process that has imported torch once and forks a child for each case."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    with subprocess.Popen([sys.executable, "-c", FORK, ROOT / "gpt.py"], cwd=folder, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("args, line", CASES)
def test_one_line_and_status_2(args, line, folder, forker):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    start = options("gpt.py", {**TINY, "max_iters": 5, "text_file": "good.txt"})
    if "=good.pt" in args:
        start = ["--max_iters=5", "--save="]
    forker.stdin.write(json.dumps([*start, *args.split(" ")]) + "\n")
    forker.stdin.flush()
    status, out, err = int(forker.stdout.readline()), folder / "out", folder / "err"
    said, told = err.read_text(encoding="utf-8"), out.read_text(encoding="utf-8")
    out.unlink(), err.unlink()
    assert (status, told) == (2, ""), said
    assert re.fullmatch("error: " + line + "\n", said)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def edited(folder, old, new):
    """Write gpt.py into the folder with one edit, which must apply once."""
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    script = folder / "gpt.py"
    script.write_text(source.replace(old, new), encoding="utf-8")
    return script


def test_a_user_sees_the_same(tmp_path, small_text):
    for script in ("gpt.py", "bigram.py"):
        done = run(ROOT / script, f"--text_file={small_text}", "--colour=red", cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: --colour=red is not --name=value with .*\n", done.stderr)


def test_out_of_memory_names_the_number_to_lower(tmp_path, small_text):
    script = edited(tmp_path, "    loss.backward()\n", "    raise torch.OutOfMemoryError('no')\n")
    done = run(script, f"--text_file={small_text}", "--max_iters=5", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: out of memory; lower batch_size=4\n"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_best(tmp_path, small_text):
    script = edited(tmp_path, "    loss.backward()\n",
                    "    loss = loss * (math.nan if step >= 7 else 1)\n    loss.backward()\n")
    done = run(script, f"--text_file={small_text}", "--max_iters=40", "--save=gpt.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the loss is nan since step 7: lower the rates\n"
    kept = torch.load(tmp_path / "gpt.pt", weights_only=True)
    assert kept["step"] == 5
    assert all(weight.isfinite().all() for weight in kept["best"]["weights"].values())


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_while_saving_leaves_the_old_file_whole(tmp_path, small_text):
    (tmp_path / "gpt.pt").write_bytes(b"the model of yesterday")
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
    done = run(ROOT / "gpt.py", f"--text_file={small_text}", "--max_iters=5", "--save=gpt.pt",
               cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write gpt.pt \(is the disk full\?\): .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.pt"]
    assert (tmp_path / "gpt.pt").read_bytes() == b"the model of yesterday"


def test_a_picture_that_cannot_be_written_is_named(tmp_path, small_text):
    (tmp_path / "gpt.png").mkdir()
    done = run(ROOT / "gpt.py", f"--text_file={small_text}", "--max_iters=5", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write gpt.png .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.png"]


def test_what_cannot_be_printed_never_ends_a_run(tmp_path):
    (tmp_path / "text.txt").write_text("天地玄黄宇宙洪荒\n" * 99, encoding="utf-8")
    done = run(ROOT / "bigram.py", "--text_file=text.txt", "--max_iters=5", cwd=tmp_path,
               env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "" and "???" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with head")
def test_a_closed_pipe_ends_it_quietly(tmp_path, small_text):
    command = [sys.executable, str(ROOT / "bigram.py"), *options("bigram.py", TINY)]
    first = subprocess.Popen([*command, f"--text_file={small_text}", "--max_iters=3000"],
                             cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout.readline().startswith(b"cpu: ")
    first.stdout.close()
    assert first.stderr.read() == b"" and first.wait() == 0
