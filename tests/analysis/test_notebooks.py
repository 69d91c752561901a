"""The notebooks are small, carry no output, and run on the files beside them as well as on runs in MLflow.

``make notebooks`` runs them in Jupyter; here their cells run in this process, which takes a second each.
"""

import ast
import json
from functools import partial

import matplotlib as mpl
import pytest

from smalto.analysis import damage_study
from smalto.analysis.shown import project_folder, read_csv

FOLDER = project_folder() / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OF_RUNS = [path for path in NOTEBOOKS if "shown(" in path.read_text()]
FILES = sorted((FOLDER / "data").glob("*.csv"))


def code_cells(path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path, monkeypatch, capsys) -> str:
    """What the first code cell prints, after all cells have run."""
    from matplotlib import pyplot

    monkeypatch.chdir(FOLDER)
    mpl.use("agg")
    namespace: dict[str, object] = {}
    first, *rest = code_cells(path)
    exec(first, namespace)
    said = capsys.readouterr().out
    for cell in rest:
        exec(cell, namespace)
    pyplot.close("all")
    return said


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert [path.name[:2] for path in OF_RUNS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_stripped(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) < 15
    for cell in cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    for cell in code_cells(path):
        functions = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.FunctionDef)]
        assert all(node.end_lineno - node.lineno < 5 for node in functions), "longer functions live in smalto.analysis"
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bundled_files_are_tiny_and_say_where_they_are_from(path):
    table, origin = read_csv(path)
    assert len(table)
    assert "arXiv" in origin or "smalto" in origin
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_the_bundled_files(path, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    said = run(path, monkeypatch, capsys)
    assert "bundled file" in said or "none of your own" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: path.stem)
def test_notebooks_run_on_recorded_runs(path, store_uri, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    assert "MLflow: " in run(path, monkeypatch, capsys)


def test_the_study_of_damage_makes_its_own_file(monkeypatch, tmp_path):
    (tmp_path / "notebooks" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(damage_study, "study", partial(damage_study.study, levels={"blur": (2,)}))
    settings, remake, *_ = code_cells(FOLDER / "04_metrics_under_damage.ipynb")
    switched = settings.replace("REMAKE, NUM_IMAGES = False, 500", "REMAKE, NUM_IMAGES = True, 4")
    assert switched != settings
    namespace: dict[str, object] = {}
    exec(switched, namespace)
    exec(remake, namespace)
    made, origin = read_csv(tmp_path / "notebooks" / "data" / "damage_study.csv")
    assert made["level"].tolist() == [0, 2]
    assert "NUM_IMAGES = 4:" in origin
    assert list(made.columns) == list(read_csv(FOLDER / "data" / "damage_study.csv")[0].columns)
