"""Both scripts as notebooks: converted by jupytext, run top to bottom in a real kernel."""
import re
import shutil

import jupytext
import nbclient
import pytest

from conftest import ROOT, TEXT, TINY


@pytest.mark.parametrize("script, cells", [("bigram.py", 9), ("gpt.py", 18)])
def test_runs_as_a_notebook(script, cells, tmp_path):
    shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "input.txt").write_text(TEXT[:20000], encoding="utf-8")
    notebook = jupytext.read(tmp_path / script)
    assert len([cell for cell in notebook.cells if cell.cell_type == "code"]) >= cells
    block = next(cell for cell in notebook.cells if "\nmax_iters = " in cell.source)
    for name, value in {**TINY, "max_iters": 30}.items():
        block.source = re.sub(rf"(?m)^{name} = .*?  #", f"{name} = {value!r}  #", block.source)
    assert "max_iters = 30  #" in block.source
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    lines = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", text, re.M)
    assert [int(step) for step, _, _ in lines] == list(range(0, 31, 5))
    assert float(lines[-1][2]) < float(lines[0][2]) - 0.2
    assert len(re.findall("characters/s", text)) == 1 and "\r" not in text
    if script == "gpt.py":
        assert (tmp_path / "gpt.png").read_bytes()[:4] == b"\x89PNG"
        shown = [output for output in outputs if output.output_type == "display_data"]
        assert any("image/png" in output.data for output in shown)
