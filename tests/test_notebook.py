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


def steady_lines(notebook) -> list[str]:
    """What it prints, but for the streamed pieces, which releases of transformers cut at different places."""
    return [line for line in printed(notebook).splitlines() if "|" not in line]


def num_pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(TOUR, as_version=4)


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """Runs a notebook in a folder, with the interpreter that runs the tests; a cell that fails is an exception."""
    directory = tmp_path_factory.mktemp("notebook")
    kernelspec.write_kernel_spec(directory / "jupyter" / "kernels" / "python3")

    def execute(notebook, folder):
        client = nbclient.NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(directory / "jupyter"))
        patch.setenv("HF_MODULES_CACHE", str(directory / "modules"))
        patch.delenv("MPLBACKEND", raising=False)  # the kernel chooses the one that draws into the notebook
        yield execute


@pytest.fixture(scope="module")
def executed(committed, execute):
    return execute(nbformat.from_dict(committed), TOUR.parent)


def test_the_streamed_answer_is_the_truth(executed):
    answer, truth = (re.search(rf"(?m)^{name}: +(.+)$", printed(executed))[1] for name in ("answer", "truth"))
    assert answer == truth == draw_scene(2_000_000_153, "wide").questions["describe"][1]


def test_it_counts_the_tokens_and_saves_the_modules(executed):
    lines = printed(executed).splitlines()
    assert "This prompt: 3 x 4 + 9 = 21 image tokens" in lines
    assert {path.name for path in ROOT.glob("*_step3.py")} <= set(lines)


def test_it_warns_of_nothing_and_draws_everything(executed):
    assert not [output for output in outputs(executed) if output.get("name") == "stderr"]
    assert num_pictures(executed) == 6


def test_what_is_committed_is_what_it_prints(committed, executed):
    assert steady_lines(committed) == steady_lines(executed)
    assert num_pictures(committed) == num_pictures(executed)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))


def test_it_finds_its_way_from_the_root(committed, execute):
    notebook = nbformat.from_dict(committed)
    notebook.cells = code_cells(notebook)[:3]  # up to the first scene
    assert draw_scene(2_000_000_153, "wide").questions["describe"][1] in printed(execute(notebook, ROOT))


def test_the_file_is_small_and_names_no_machine(committed):
    assert TOUR.stat().st_size < 600_000
    texts = [cell.source for cell in committed.cells] + [printed(committed)]
    texts += [output.data.get("text/plain", "") for output in outputs(committed) if "data" in output]
    pattern = r"(?<![\w./])/(?:\w[\w.-]*)/|\b[A-Z]:\\"
    assert not [match[0] for text in texts for match in re.finditer(pattern, text)]
