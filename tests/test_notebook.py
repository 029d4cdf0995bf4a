"""The notebook: kept without outputs, and run from top to bottom as it is (pytest -m notebook)."""

import os
from pathlib import Path

import micro
import nbformat
import pytest
from says import refused

NOTEBOOK = micro.ROOT / "launch" / "wmjax_colab.ipynb"


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert (cell.outputs, cell.execution_count) == ([], None)
        assert "skip" not in " ".join(cell.metadata.get("tags", ()))


@pytest.mark.parametrize(
    ("address", "said"),
    [("", ["REPOSITORY"]), ("nowhere", ["git clone", "nowhere", "'nowhere'"])],
)
def test_outside_of_a_checkout_it_says_what_to_fill_in(address, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    assert 'REPOSITORY = ""' in source
    with refused(*said, error=Exception, lines=None) as stop:
        exec(source.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}"), {"__name__": "cell"})
    assert stop.value._render_traceback_() == [str(stop.value)]  # all that IPython then shows


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_it_runs_from_top_to_bottom(monkeypatch):
    from nbclient import NotebookClient

    for name in ("NUM_CPU_DEVICES", "NUMPY_DTYPE_PROMOTION", "NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(f"JAX_{name}")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    monkeypatch.setenv("PYTHONPATH", str(Path(micro.ROOT)))
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": micro.ROOT}}
    ).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    shown = [output for cell in ran for output in cell.outputs if "data" in output]
    kinds = [kind for output in shown for kind in output["data"]]
    assert kinds.count("image/png") >= 4  # curves, probe, roll-outs, energies
    assert any("video" in output["data"].get("text/html", "") for output in shown)
