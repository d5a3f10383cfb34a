"""The text from file to batch, the download, the evaluation, and what a user sees of a run."""
import hashlib
import http.server
import re
import threading

import pytest
import torch
from conftest import GPT, ROOT, TEXT, TINY, play, play_in_32_bits, run, words

GOOD = TEXT[:5000].encode()


@pytest.fixture(scope="module")
def server():
    """The address of a local server whose paths answer well or badly."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/404":
                return self.send_error(404)
            body = GOOD[:-1] + b"?" if self.path == "/wrong" else GOOD
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:-99] if self.path == "/cut" else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def download(script, address, folder):
    """Run a copy of a script alone in an empty folder, with another address."""
    source = (ROOT / script).read_text(encoding="utf-8")
    for old, new in (('(?m)^url = ".+"', f'url = "{address}"'),
                     ('"[0-9a-f]{64}"', repr(hashlib.sha256(GOOD).hexdigest()))):
        source, found = re.subn(old, new, source)
        assert found == 1
    (folder / script).write_text(source, encoding="utf-8")
    return play(folder / script, folder, text_file="input.txt", save="")


@pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])
def test_a_missing_text_is_downloaded(server, script, tmp_path):
    done = download(script, server + "/right", tmp_path)
    assert (done.status, done.err) == (0, "") and 10 in done.losses
    assert {path.name for path in tmp_path.iterdir()} == {script, "input.txt"}
    assert (tmp_path / "input.txt").read_bytes() == GOOD


@pytest.mark.parametrize("path", ["/wrong", "/cut", "/404", "refused"])
@pytest.mark.parametrize("script", ["bigram.py", "gpt.py"])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, script, path, tmp_path):
    done = download(script, "http://127.0.0.1:9/" if path == "refused" else server + path, tmp_path)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r".*input\.txt: .*put a text in UTF-8 there\n", done.err)
    assert [path.name for path in tmp_path.iterdir()] == [script]


@pytest.mark.parametrize("content", ["天地玄黄宇宙洪荒日月盈昃" * 99, "héé 😀🙂\n" * 99,
                                     "one\r\ntwo\r\n" * 99, "no end of a line " * 60])
def test_any_text(content, tmp_path):
    """Other languages, Windows line endings, and a text without any."""
    (tmp_path / "text.txt").write_bytes(content.encode())
    done = play("gpt.py", tmp_path, text_file="text.txt", save="")
    text, space = content.replace("\r\n", "\n"), done.space
    assert done.status == 0 and done.losses[10] < done.losses[0] and len(done.sample) == 6
    assert space["chars"] == sorted(set(text))
    assert space["decode"](space["encode"](text)) == text
    assert space["decode"](space["train_data"]) == text[:int(0.9 * len(text))]
    assert space["decode"](space["val_data"]) == text[int(0.9 * len(text)):]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The globals of a gpt.py that has learned from a little text."""
    folder = tmp_path_factory.mktemp("space")
    (folder / "input.txt").write_text(TEXT[:3000], encoding="utf-8")
    return play_in_32_bits("gpt.py", folder, save="").space


def test_the_deck(tmp_path):
    """Every piece once in each pass, in another order; then all again, cut at other places."""
    (tmp_path / "input.txt").write_text(TEXT[:3000], encoding="utf-8")
    top = GPT.split("# %% [markdown]\n# ## What a language model does")[0]
    (tmp_path / "top.py").write_text(top, encoding="utf-8")
    space, pieces, places = play(tmp_path / "top.py", tmp_path, max_iters=130).space, [], []
    size = len(space["train_data"])
    space["train_data"] = torch.arange(size)
    for step in range(1, 131):
        inputs, targets = space["get_batch"](step)
        assert inputs.shape == targets.shape == (4, 16)
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        pieces += inputs[:, 0].tolist()
    while len(pieces) > size // 16:
        places.append(pieces[0] % 16)
        cuts = list(range(places[-1], size - 16, 16))
        dealt, pieces = pieces[:len(cuts)], pieces[len(cuts):]
        assert sorted(dealt) == cuts and dealt != cuts
    assert len(set(places)) == 3


def test_evaluating_and_sampling_do_not_change_the_training(tmp_path):
    runs = [play("gpt.py", tmp_path, max_iters=4, eval_interval=n, samples=m, dropout=0.2,
                 temperature=t, save="").space for n, m, t in ((1, 3, 2.0), (4, 1, 1.0))]
    assert [len(space["losses"]) for space in runs] == [5, 2]
    for a, b in zip(*(space["model"].parameters() for space in runs)):
        assert torch.equal(a, b)


def test_evaluation_is_a_plain_loop_over_the_split(space):
    for parameter in space["model"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model, val = space["model"], space["val_data"]
    found = space["estimate_loss"](val)
    assert found == space["estimate_loss"](val)
    parts = [model(val[i:i + 16][None], val[i + 1:i + 17][None])[1].item()
             for i in range(0, len(val) - 16, 16)]
    assert found == pytest.approx(sum(parts) / len(parts), rel=1e-5)


def test_what_a_run_prints_in_a_pipe(tmp_path):
    """How long it takes within ten steps, losses, samples; the same again with the same seed.

    It runs under a profiler, as a user may do.
    """
    (tmp_path / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    numbers = words({**TINY, "max_iters": 110, "eval_interval": 50, "samples": 2, "save": "",
                     "prompt": "The"})
    done = run("-m", "cProfile", "-o", "profile", ROOT / "gpt.py", *numbers, cwd=tmp_path)
    again = run(ROOT / "gpt.py", *numbers, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    progress = r"(?m)^step (\d+) of 110: loss \d\.\d+, \d+\.\d minutes left$"
    assert re.findall(progress, done.stdout) == ["10", "110"]
    assert re.findall(r"(?m)^step (\d+): train", done.stdout) == [
        "0", "2", "0", "50", "100", "110"]
    samples = re.split(r"--- sample [12] of 2 ---\n", done.stdout)[1:]
    assert samples[0][:8] != samples[1][:8] and all(text.startswith("The") for text in samples)
    assert "\r" not in done.stdout
    assert "means of 2, 4, 6, 8 so far: [2.0, 3.0, 4.0, 5.0]" in done.stdout
    losses = r"(?m)^step \d+: train.*"
    assert re.findall(losses, done.stdout) == re.findall(losses, again.stdout)


def test_numbers_at_the_top_are_options(tmp_path):
    """Those that a user adds as well; and --help names them all."""
    source = GPT.replace("\nprompt =", "\nlabel_smoothing = 0.1\nname_of_it = 'x'\nprompt =")
    source = source.replace("targets.flatten())", "targets.flatten(), "
                            "label_smoothing=label_smoothing)")
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    done = play(tmp_path / "mine.py", tmp_path, "--label_smoothing=0.25", save="")
    assert done.status == 0 and done.space["label_smoothing"] == 0.25
    assert done.losses[0] == pytest.approx(play("gpt.py", tmp_path, save="").losses[0], abs=1e-3)
    said = play(tmp_path / "mine.py", tmp_path, "--help").out
    block = source.split("## Hyperparameters")[1].split("numbers =")[0]
    for name in set(re.findall(r"(?m)^(\w+) = ", block)) - {"gpu"}:
        assert f"--{name} " in said


def test_the_numbers_of_a_gpu(tmp_path, monkeypatch):
    """They take the place of those for a CPU, but not if --device=cpu is given.

    Each process has a GPU of its own.
    """
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    source = GPT.split("# %% [markdown]\n# ## The text")[0]
    (tmp_path / "top.py").write_text(source + "\n\ndef encode():\n    pass\n", encoding="utf-8")
    for args, numbers in ((["--n_head=4"], ("cuda", 384, 4, 6, 256)),
                          (["--device=cpu"], ("cpu", 192, 2, 4, 256))):
        space = play(tmp_path / "top.py", tmp_path, *args, tiny=False).space
        assert tuple(space[name] for name in (
            "device", "n_embd", "n_head", "n_layer", "block_size")) == numbers
    assert seen == [1]


@pytest.mark.parametrize("args, line", [
    (["--n_layers=3"], "unrecognized arguments: --n_layers=3"),
    (["--max_iters=2.5"], ".*max_iters.*int.*'2.5'"),
    (["--batch_size=0"], "sizes should be at least 1,.*"),
    (["--n_layer=-2"], "sizes should be at least 1,.*"),
    (["--n_head=3"], ".*n_embd a multiple of 4 . n_head"),
    (["--text_file=nowhere.txt"], ".*nowhere.txt.*No such file.*"),
    (["--text_file=latin.txt"], ".*latin.txt: .*utf-8.*UTF-8 there"),
    (["--text_file=short.txt"], ".*short.txt.*more than 160 characters.*"),
    (["--prompt=\N{SNOWMAN}"], ".*'\N{SNOWMAN}'.*input.txt.*"),
    (["--save=nowhere/gpt.pt"], ".*nowhere/gpt.pt.*folder.*")])
def test_bad_input_is_one_line_and_leaves_nothing(args, line, tmp_path):
    (tmp_path / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1") * 999)
    (tmp_path / "short.txt").write_text("abc " * 20)
    before = {path.name for path in tmp_path.iterdir()} | {"gpt.py"}
    done = play("gpt.py", tmp_path, *args)
    assert done.status == 2 and re.fullmatch(rf"gpt.py: error: {line}\n", done.err), done.err
    assert "--- sample" not in done.out and {path.name for path in tmp_path.iterdir()} == before
