"""The text from file to batch, the download, the evaluation, and what a user sees of a run."""
import ast
import hashlib
import http.server
import os
import re
import shutil
import threading
import time

import pytest
import torch

from conftest import ROOT, TEXT, TINY, names, options, run

GOOD = TEXT[:5000].encode()


@pytest.fixture(scope="module")
def server():
    """The address of a local server whose paths answer well or badly."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/stalled":
                time.sleep(3)
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
        httpd.shutdown()


def download(script, address, folder):
    """Run a script alone in an empty folder, its 30 seconds' patience cut to one."""
    source = (ROOT / script).read_text(encoding="utf-8")
    assert source.count("timeout=30") == 1
    (folder / script).write_text(source.replace("timeout=30", "timeout=1"), encoding="utf-8")
    return run(folder / script, f"--text_url={address}", "--max_iters=1",
               f"--text_sha256={hashlib.sha256(GOOD).hexdigest()}", cwd=folder)


@pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])
def test_a_missing_text_is_downloaded(server, script, tmp_path):
    done = download(script, server + "/right", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "input.txt").read_bytes() == GOOD
    assert "step 1: train loss" in done.stdout


@pytest.mark.parametrize("path", ["/wrong", "/cut", "/404", "/stalled", "refused"])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, path, tmp_path):
    address = "http://127.0.0.1:9/" if path == "refused" else server + path
    done = download("bigram.py", address, tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: .*{re.escape(address)}.*by hand.*\n", done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["bigram.py"]


def test_paths(tmp_path):
    """The default text lies beside the script; any other path starts at the working folder."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    shutil.copy(ROOT / "bigram.py", home)
    (home / "input.txt").write_text("ab" * 500), (work / "other.txt").write_text("xyz" * 500)
    (work / "input.txt").write_text("no" * 9)
    assert "1,000 characters\nguessing among 2:" in run(home / "bigram.py", cwd=work).stdout
    done = run(home / "bigram.py", "--text_file=other.txt", cwd=work)
    assert "1,500 characters\nguessing among 3:" in done.stdout


@pytest.mark.parametrize("content, characters", [
    ("天地玄黄宇宙洪荒日月盈昃".encode() * 99, 12), ("héé 😀🙂\n".encode() * 99, 6),
    (b"one\r\ntwo\r\n" * 99, 6), (b"\xef\xbb\xbf" + b"one\ntwo\n" * 99, 6)])
def test_any_utf8(content, characters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(content)
    space = names("bigram.py", text_file="text.txt")
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    assert space["vocab_size"] == characters and space["chars"] == sorted(set(text))
    assert space["decode"](space["encode"](text)) == text == space["text"]
    split = int(0.9 * len(text))
    assert space["decode"](space["train_data"]) == text[:split]
    assert space["decode"](space["val_data"]) == text[split:]
    assert space["newline"] == ("\n" if "\n" in text else min(text))


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return names("gpt.py")


def test_batches_read_all_of_the_text_before_any_of_it_twice(space):
    block, text = space["block_size"], torch.arange(1000, dtype=torch.int32)
    space.update(train_data=text, queue=space["queue"][:0])
    seen = []
    while not seen or len(space["queue"]) >= space["batch_size"]:
        inputs, targets = space["get_batch"]()
        assert inputs.shape == targets.shape == (space["batch_size"], block)
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        seen += inputs.flatten().tolist()
    assert len(seen) == len(set(seen)) and len(seen) > 1000 - 2 * block - 4 * block
    starts = seen[::block]
    assert starts != sorted(starts) and len({start % block for start in starts}) == 1
    first, size = set(starts), space["batch_size"]
    second = [int(x) for _ in range(900 // block // size) for x in space["get_batch"]()[0][:, 0]]
    assert not first & set(second[size:])  # the next epoch cuts the text elsewhere


def test_measuring_and_sampling_do_not_change_the_batches(small_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [names("gpt.py", text_file=small_text, max_iters=12, eval_interval=n, samples=m)
            for n, m in ((1, 3), (12, 1))]
    for a, b in zip(runs[0]["model"].parameters(), runs[1]["model"].parameters()):
        assert torch.equal(a, b)


def test_evaluation_is_a_plain_loop_over_the_split(space):
    for weight in space["model"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    block, found, model = space["block_size"], space["estimate_loss"](), space["model"]
    assert model.training and found == space["estimate_loss"]()
    model.eval()
    val = space["val_data"].long()
    losses = [model(val[i:i + block][None], val[i + 1:i + block + 1][None])[1].item()
              for i in range(0, len(val) - block, block)]
    assert len(losses) == (len(val) - 1) // block
    assert found[1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_long_split_is_represented_by_evenly_spaced_windows(space):
    seen, block = [], space["block_size"]

    class Spy:
        def __call__(self, inputs, targets):
            seen.extend(inputs[:, 0].tolist())
            return None, torch.tensor(1.0)

        def eval(self):
            pass
        train = eval
    space.update(model=Spy(), train_data=torch.arange(9 * 2**19), val_data=torch.arange(2**19 + 77))
    assert space["estimate_loss"]() == [1, 1]
    train, val = seen[:2**18 // block], seen[2**18 // block:]
    assert len(train) == len(val) == 2**18 // block
    for starts, size in ((train, 9 * 2**19), (val, 2**19 + 77)):
        gaps = {b - a for a, b in zip(starts, starts[1:])}
        assert min(gaps) >= block and max(gaps) - min(gaps) <= block
        assert starts[0] == 0 and size - starts[-1] < 2 * max(gaps)


@pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])
def test_what_a_run_prints(script, small_text, tmp_path):
    args = [f"--text_file={small_text}", "--max_iters=12", "--samples=3", "--prompt=The"]
    done, again = (run(ROOT / script, *args, cwd=tmp_path) for _ in range(2))
    assert done.returncode == 0 and done.stderr == ""
    lines = re.findall(r"^step (\d+): train loss \d\.\d{4}, val loss \d\.\d{4}$", done.stdout, re.M)
    assert lines == ["0", "5", "10", "12"]
    assert len(re.findall(r"^10 of 12: .* minutes left $", done.stdout, re.M)) == 1
    def same(out):  # the speed differs from run to run, all else is the same to the last character
        return re.sub(r"^10 of 12: .*\n", "", out, flags=re.M)
    assert same(done.stdout) == same(again.stdout)
    answers = re.split(r"--- sample \d of 3 ---\n", done.stdout)[1:]
    assert len(set(answers)) == 3 and all(a.startswith("The") and len(a) == 9 for a in answers)


@pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])
def test_help_lists_every_option_with_its_default(script, small_text, tmp_path):
    done = run(ROOT / script, "--help", cwd=tmp_path, tiny=False)
    assert done.returncode == 0 and done.stderr == ""
    listed = [re.fullmatch(r"--(\w+)=(\S+)  \S.+", line) for line in done.stdout.splitlines()]
    defaults = {found[1]: ast.literal_eval(found[2]) for found in listed}
    known = run(ROOT / script, "--nonsense=1", cwd=tmp_path).stderr.partition("out of ")[2]
    assert list(defaults) == known.strip().split(", ")
    tiny = {**TINY, "text_file": small_text}
    outputs = [run(ROOT / script, *options(script, {**numbers, **tiny}), cwd=tmp_path, tiny=False)
               for numbers in (defaults, {})]
    assert outputs[0].returncode == 0 and outputs[0].stdout == outputs[1].stdout


def test_prompts_from_the_keyboard(small_text, tmp_path):
    done = run(ROOT / "bigram.py", f"--text_file={small_text}", "--prompt=-", cwd=tmp_path,
               input="First\n\N{SNOWMAN}\nSpeak \n")
    answers = done.stdout.split("--- sample 1 of 1 ---\n")[1:]
    assert done.returncode == 0 and done.stderr == ""
    assert [answer[:5] for answer in answers] == ["First", "Speak"]
    assert len(answers[1]) == len("Speak ") + 5 + 1  # the space is part of the prompt
    assert done.stdout.count("some of these characters are unknown") == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_the_status_line_of_a_terminal(small_text, tmp_path):
    import pty
    import subprocess
    import sys
    here, there = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "bigram.py", *options("bigram.py", TINY),
                                f"--text_file={small_text}", "--max_iters=9"], cwd=tmp_path,
                               stdout=there, stderr=there)
    os.close(there)
    out = b""
    while True:
        try:
            chunk = os.read(here, 4096)
        except OSError:
            break
        if not chunk:
            break
        out += chunk
    os.close(here)
    assert process.wait() == 0
    line = rb"(\d) of 9: loss \d\.\d+, [\d,]+ characters/s, [\d.]+ minutes left \r"
    assert re.findall(line, out) == [b"%d" % n for n in range(1, 10)]
    assert out.count(b" " * 79 + b"\rstep ") == 3
