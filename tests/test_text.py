"""The text from file to batch, the download, the evaluation, and what a user sees of a run."""
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY, Quick, names, options, run

GOOD = TEXT[:5000].encode()
BOTH = pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])


@pytest.fixture(scope="module")
def server():
    """The address of a local server whose paths answer well or badly."""
    leave = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/stalled":
                return leave.wait()
            if self.path == "/404":
                return self.send_error(404)
            body = GOOD[:-1] + b"?" if self.path == "/wrong" else GOOD
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 99 * (self.path == "/cut")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        leave.set()
        httpd.shutdown()


def download(script, address, folder):
    """Run a copy of a script alone in an empty folder, with another address and less patience."""
    source = (ROOT / script).read_text(encoding="utf-8")
    for old, new in (('(?m)^url = ".+"', f'url = "{address}"'), ("timeout=30", "timeout=1"),
                     ('"[0-9a-f]{64}"', repr(hashlib.sha256(GOOD).hexdigest()))):
        source, found = re.subn(old, new, source)
        assert found == 1
    (folder / script).write_text(source, encoding="utf-8")
    return Quick(folder / script, "--max_iters=1", cwd=folder).end()


@BOTH
def test_a_missing_text_is_downloaded(server, script, tmp_path):
    done = download(script, server + "/right", tmp_path)
    assert (done.status, done.stderr) == (0, "")
    assert {p.name for p in tmp_path.iterdir()} == {script, "input.txt"}
    assert (tmp_path / "input.txt").read_bytes() == GOOD and "step 1: train loss" in done.stdout


@pytest.mark.parametrize("path", ["/wrong", "/cut", "/404", "/stalled", "refused"])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, path, tmp_path):
    address = "http://127.0.0.1:9/" if path == "refused" else server + path
    done = download("gpt.py", address, tmp_path)
    assert (done.status, done.stdout) == (2, "")
    assert re.fullmatch(r"gpt\.py: error: .*input\.txt .*by hand.*\n", done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["gpt.py"]


def test_paths(tmp_path):
    """The default text lies beside the script; any other path starts at the working folder."""
    home, work = tmp_path / "home of scripts", tmp_path / "wörk"
    home.mkdir(), work.mkdir()
    shutil.copy(ROOT / "gpt.py", home)
    (home / "input.txt").write_text("ab" * 500), (work / "other.txt").write_text("xyz" * 500)
    (work / "input.txt").write_text("no" * 900)
    assert "1,000 characters" in Quick(home / "gpt.py", cwd=work).end().stdout
    assert "1,500 char" in Quick(home / "gpt.py", "--text_file=other.txt", cwd=work).end().stdout
    for path in ("./input.txt", "input.txt"):
        assert "1,800 ch" in Quick(home / "gpt.py", f"--text_file={path}", cwd=work).end().stdout


@pytest.mark.parametrize("content, characters", [
    ("天地玄黄宇宙洪荒日月盈昃".encode() * 99, 12), ("héé 😀🙂\n".encode() * 99, 6),
    (b"one\r\ntwo\r\n" * 99, 6), (b"\xef\xbb\xbf" + b"one\ntwo\n" * 99, 6)])
def test_any_utf8(content, characters, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    space = names("bigram.py", tmp_path, text_file="text.txt")
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    assert space["vocab_size"] == characters and space["chars"] == sorted(set(text))
    assert space["decode"](space["encode"](text)) == text == space["text"]
    split = int(0.9 * len(text))
    assert space["decode"](space["train_data"]) == text[:split]
    assert space["decode"](space["val_data"]) == text[split:]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A trained gpt.py, with three passes over its little text."""
    folder = tmp_path_factory.mktemp("space")
    (folder / "text.txt").write_text(TEXT[:3000], encoding="utf-8")
    return names("gpt.py", folder, text_file="text.txt", max_iters=130, eval_interval=65)


def test_batches_read_all_of_the_text_before_any_of_it_twice(space, monkeypatch):
    block, size = space["block_size"], len(space["train_data"])
    monkeypatch.setitem(space, "train_data", torch.arange(size))
    pieces = []
    for step in range(1, 131):
        inputs, targets = space["get_batch"](step)
        assert inputs.shape == targets.shape == (space["batch_size"], block)
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        pieces += inputs.tolist()
    seen = set()
    count = next(i for i, piece in enumerate(pieces) if seen & set(piece) or seen.update(piece))
    assert len(seen) == count * block >= size - 3 * block  # all but the rim, none of it twice
    cuts = set()
    for first in range(0, 3 * count, count):
        deal = pieces[first:first + count]
        assert len({place for piece in deal for place in piece}) == count * block
        assert deal != sorted(deal)
        cuts |= {piece[0] % block for piece in deal}
    assert len(cuts) == 3  # the next pass cuts elsewhere


def test_names_change_places_and_nothing_else_does(tmp_path):
    """Step 17, word by word: the same words but for names, of which each has one other name."""
    text = TEXT[:40000] + "\n\nTYBALT:\nTybalt!"  # whom only validation knows
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    space = names("gpt.py", tmp_path, text_file="text.txt", max_iters=1, block_size=2000)
    known = {"COMINIUS", "LARTIUS", "VALERIA", "TITUS", "VIRGILIA", "MENENIUS", "CORIOLANUS",
             "SICINIUS", "BRUTUS", "CAIUS", "MARCIUS", "AUFIDIUS"}
    assert sorted(space["names"]) == sorted(known)  # Volumnia is only in capitals here
    found = set()
    for seed in range(40):
        for start in (0, 3001, 20000):
            before = TEXT[start:start + 2001]
            torch.manual_seed(seed)
            after = space["rename"](before)
            torch.manual_seed(seed)
            assert after == space["rename"](before)  # chance is the seed's only
            assert len(after) == len(before) and re.sub(r"\w", "x", before) == re.sub(
                r"\w", "x", after)
            other = {}
            for old, new in zip(re.findall(r"\w+", before), re.findall(r"\w+", after)):
                if old.upper() in known and old in (old.upper(), old.title()):
                    assert new.isupper() == old.isupper() and new.upper() in known
                    assert other.setdefault(old.upper(), new.upper()) == new.upper()
                else:
                    assert old == new
            assert len(set(other.values())) == len(other)  # no two get the same name
            found |= set(other.items())
    assert len({old for old, _ in found}) > 5
    for name in {old for old, _ in found}:  # each becomes any one of its length, itself too
        assert {new for old, new in found if old == name} == {
            new for new in known if len(new) == len(name)}


@pytest.mark.parametrize("content", [
    "abc def\n" * 99, "\u00dfA\u0130B \u00dfa\u0130b, ABC xyz\n" * 50,
    "ABC Abc abc XYZ Xyz xyz\n" * 80, "ABC Abc A12 B34 DEF\n" * 60])
def test_a_text_without_two_names_stays_as_it_is(content, tmp_path):
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    space = names("gpt.py", tmp_path, text_file="text.txt", max_iters=1, block_size=8)
    for i in range(60):
        assert space["rename"](content[i:]) == content[i:]


def test_the_pieces_trained_on_are_those_of_the_text_with_other_names(tmp_path):
    text = "ROMEO:\nO Henry, Paris!\n\nPARIS:\nRomeo?\n\nHENRY:\nNo.\n\n" * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    space = names("gpt.py", tmp_path, text_file="text.txt", max_iters=1, block_size=64)

    def pieces(function, step):
        torch.manual_seed(step)
        inputs, targets = space[function](step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return [space["decode"](ids) for ids in torch.cat([inputs, targets[:, -1:]], 1).tolist()]

    heard = set()
    for step in range(1, 51):
        plain, renamed = pieces("get_batch", step), pieces("get_renamed_batch", step)
        assert renamed == pieces("get_renamed_batch", step)  # chance is the seed's only
        for before, after in zip(plain, renamed):
            before, after = (re.sub(r"(?i)\b(romeo|henry|paris)\b", "?", piece)
                             for piece in (before, after))
            assert before == after
        heard |= set(renamed)
    assert len(heard) > 150  # 400 pieces, from about 60 places, in which names have 6 orders


def test_a_longer_training_begins_with_the_same_batches(space, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:3000], encoding="utf-8")
    short = names("gpt.py", tmp_path, text_file="text.txt", max_iters=60)
    for step in range(1, 61):
        assert torch.equal(space["get_batch"](step)[0], short["get_batch"](step)[0])
    other = names("gpt.py", tmp_path, text_file="text.txt", max_iters=1, seed=1)
    assert not torch.equal(space["get_batch"](1)[0], other["get_batch"](1)[0])


def test_evaluating_and_sampling_do_not_change_the_training(tmp_path):
    runs = [names("gpt.py", tmp_path, max_iters=12, eval_interval=n, samples=m, dropout=0.2,
                  temperature=t) for n, m, t in ((1, 3, 2), (12, 1, 1))]
    assert [len(space["losses"]) for space in runs] == [13, 2]
    assert [space["best"]["step"] for space in runs] == [12, 12]
    for a, b in zip(*(space["model"].parameters() for space in runs)):
        assert torch.equal(a, b)


def test_evaluation_is_a_plain_loop_over_the_split(space):
    for weight in space["model"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    block, model, val = space["block_size"], space["model"], space["val_data"]
    found = space["estimate_loss"](val)
    assert found == space["estimate_loss"](val)
    losses = [model(val[i:i + block][None], val[i + 1:i + block + 1][None])[1].item()
              for i in range(0, len(val) - block, block)]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@BOTH
def test_what_a_run_prints(script, small_text, tmp_path):
    args = [f"--text_file={small_text}", "--samples", "3", "--prompt", "The"]
    done = Quick(ROOT / script, *args, "--max_iters=12", cwd=tmp_path).end()
    again = Quick(ROOT / script, *args, "--max_iters", "12", cwd=tmp_path).end()
    assert (done.status, done.stderr) == (0, "") and done.stdout == again.stdout
    line = r"(?m)^step (\d+): train loss \d\.\d{4}, val loss \d\.\d{4} *$"
    assert re.findall(line, done.stdout) == ["0", "5", "10", "12"]
    answers = re.split(r"--- sample [123] of 3 ---\n", done.stdout)[1:]
    assert len(set(answers)) == 3 and all(a.startswith("The") and len(a) == 9 for a in answers)
    assert "\r" not in done.stdout and "characters/s" not in done.stdout  # it is no terminal
    means = "means of 2, 4, 6, 8 so far: [2. 3. 4. 5.]\n"
    assert done.stdout.count(means) == (script == "gpt.py")


@BOTH
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_hyperparameter_with_its_gloss(script, word, tmp_path):
    source = (ROOT / script).read_text(encoding="utf-8")
    source = source.replace("# training steps:", "# 100% of the training steps:")
    (tmp_path / script).write_text(source, encoding="utf-8")
    done = Quick(tmp_path / script, word, cwd=tmp_path).end()
    assert (done.status, done.stderr) == (0, "")
    block = source.split("## Hyperparameters")[1]
    block = re.findall(r"(?m)^(\w+) = .+?  # (.+)", block.split("## Options")[0])
    shown = "".join(done.stdout.split())  # however it is wrapped
    assert len(block) == {"bigram.py": 13, "gpt.py": 24}[script]
    for name, gloss in block:
        assert f"--{name}{name.upper()}{''.join(gloss.split())}" in shown


def test_prompts_from_the_keyboard(small_text, tmp_path):
    done = run(ROOT / "gpt.py", f"--text_file={small_text}", "--prompt=-", "--samples=2",
               cwd=tmp_path, errors="surrogateescape",
               input="First\n\N{SNOWMAN}\n\udcff\udcfe\nSpeak \r\n")
    assert (done.returncode, done.stderr) == (0, "")
    answers = re.split("--- sample [12] of 2 ---\n", done.stdout)[1:]
    assert [answer[:5] for answer in answers] == ["First", "First", "Speak", "Speak"]
    assert len(answers[3]) == len("Speak ") + 5 + 1  # the space is part of the prompt
    assert done.stdout.count("it knows these characters only") == 2


@BOTH
def test_a_prompt_is_continued_as_it_is(script, small_text, tmp_path):
    done = run(ROOT / script, f"--text_file={small_text}", "--prompt= The \n", cwd=tmp_path)
    answer = done.stdout.split("--- sample 1 of 1 ---\n")[1]
    assert answer.startswith(" The \n") and len(answer) == len(" The \n") + 5 + 1


def on_a_terminal(script, *args, cwd):
    """Run a script on a pseudo-terminal; return its status, all it wrote, and the lines it left."""
    pty = pytest.importorskip("pty")
    here, there = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / script, *options(script, TINY), *args],
                               cwd=cwd, stdout=there, stderr=there, stdin=subprocess.DEVNULL)
    os.close(there)
    out = b""
    try:
        while chunk := os.read(here, 4096):
            out += chunk
    except OSError:  # how the end of a pseudo-terminal is told
        pass
    os.close(here)
    lines = []
    for line in out.decode().replace("\r\n", "\n").split("\n"):
        left = ""
        for part in line.split("\r"):
            left = part + left[len(part):]  # what comes later lies over what was there
        lines.append(left.rstrip())
    return process.wait(), out.decode(), lines


def test_the_status_line_of_a_terminal(small_text, tmp_path):
    status, out, lines = on_a_terminal("bigram.py", f"--text_file={small_text}", "--max_iters=60",
                                       "--eval_interval=30", cwd=tmp_path)
    assert status == 0
    line = r"step (\d+) of 60: loss \d\.\d+, +\d+\.\d minutes left \r"
    assert re.findall(line, out) == ["10", "20", "30", "40", "50", "60"]
    assert not [left for left in lines if " of 60" in left]
    left = [left for left in lines if re.match(r"step \d+:", left)]
    assert len(left) == 3
    assert all(re.fullmatch(r"step \d+: train loss \d\.\d+, val loss \d\.\d+", x) for x in left)


def test_an_error_is_not_printed_over_the_status_line(small_text, tmp_path):
    status, out, lines = on_a_terminal(
        "gpt.py", f"--text_file={small_text}", "--max_iters=1000000", "--eval_interval=200",
        "--learning_rate=200", "--muon_lr=200", cwd=tmp_path)
    assert status == 2
    error = r"gpt\.py: error: the loss is no longer a number; lower the learning rates"
    assert re.fullmatch(error, [left for left in lines if left][-1])


@BOTH
def test_what_cannot_be_printed_becomes_a_question_mark(script, tmp_path):
    (tmp_path / "text.txt").write_text("天地玄黄宇宙洪荒\n" * 99, encoding="utf-8")
    done = run(ROOT / script, "--text_file=text.txt", "--max_iters=5", cwd=tmp_path,
               env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "???" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("rest", ["| head -1", ">&-", "<&-"])
def test_closed_pipes_and_streams(rest, small_text, tmp_path):
    words = [sys.executable, "gpt.py", *options("gpt.py", TINY), "--max_iters=30"]
    shutil.copy(ROOT / "gpt.py", tmp_path), shutil.copy(small_text, tmp_path / "input.txt")
    done = subprocess.run(f"{' '.join(words)} {rest}; echo ${{PIPESTATUS[0]}} >status", shell=True,
                          executable="/bin/bash", cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 or "head" not in rest
    ends = {"0", "141"} if "head" in rest else {"0"}  # 141: by SIGPIPE, as cat and others do
    assert Path(tmp_path, "status").read_text().strip() in ends
