"""The tour in notebooks/ runs from top to bottom, and what the committed file shows is what it prints."""

import re

import pytest
from conftest import ROOT
from draw_scene import draw_scene


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
kernelspec = pytest.importorskip("ipykernel.kernelspec")
pytest.importorskip("matplotlib")

TOUR = ROOT / "notebooks" / "tour.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def num_pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_it_prints_what_is_committed_and_that_is_true(tmp_path, monkeypatch):
    kernelspec.write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses the one that draws into the notebook
    committed = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": str(TOUR.parent)}}
    notebook = nbformat.from_dict(committed)
    executed = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    # But for the streamed pieces, which releases of transformers cut at different places.
    before, lines = (
        [line for line in printed(notebook).splitlines() if "|" not in line] for notebook in (committed, executed)
    )
    assert lines == before
    assert num_pictures(executed) == num_pictures(committed) == 7
    assert not [output for output in outputs(executed) if output.get("name") == "stderr"]
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    answer, truth = (re.search(rf"(?m)^{name}: +(.+)$", printed(executed))[1] for name in ("answer", "truth"))
    assert answer == truth == draw_scene(2_000_000_153, "wide").questions["describe"][1]
    assert "This prompt: 3 x 4 + 9 = 21 image tokens" in lines
    assert {path.name for path in ROOT.glob("*_step3.py")} <= set(lines)


def test_the_file_is_small_and_names_no_machine():
    committed = nbformat.read(TOUR, as_version=4)
    assert TOUR.stat().st_size < 600_000
    texts = [cell.source for cell in committed.cells] + [printed(committed)]
    texts += [output.data.get("text/plain", "") for output in outputs(committed) if "data" in output]
    pattern = r"(?<![\w./])/(?:\w[\w.-]*)/|\b[A-Z]:\\"
    assert not [match[0] for text in texts for match in re.finditer(pattern, text)]
