"""The notebook docs/tour.ipynb: it runs, and what is committed is a run of it from top to bottom."""

import json
import re

import nbclient
import nbformat
import pytest

from conftest import ENVIRONMENT, ROOT

TOUR = ROOT / "docs/tour.ipynb"
PARAMETERS = {"iterations = 500": "iterations = 30", "combination_steps = 80": "combination_steps = 20"}
FIGURES = """
energies = {name: height.mean().item() for name, height in heights.items()}
falls = energy(starts, labels).mean().item() - energy(samples, labels).mean().item()
print(json.dumps([accuracy, aurocs, energies, falls, overlaps.tolist()]))
"""


def read_tour():
    return nbformat.read(TOUR, as_version=4)


def list_pictures(notebook):
    """Return the pictures of each code cell of a notebook."""
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in codes]


def test_committed_outputs():
    """Breaks when the notebook was not run from top to bottom, failed, lost outputs, or tells of a machine."""
    tour = read_tour()
    codes = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum(list_pictures(tour)) == 8
    texts = [cell.source for cell in tour.cells] + [output.get("text", "") for output in outputs]
    assert not re.search(r"(?<!\w)/\w+/", "\n".join(texts)), "the path of a folder that others do not have"
    assert TOUR.stat().st_size < 1.5e6 and not any("execution" in cell.metadata for cell in codes)
    for parameter in PARAMETERS:
        assert parameter in next(cell.source for cell in codes if "parameters" in cell.metadata.get("tags", []))
    for link in re.findall(r"\]\((\w+\.\w+)\)", "".join(cell.source for cell in tour.cells)):
        assert (ROOT / "docs" / link).exists(), link


def test_committed_figures():
    """Breaks when what the text says of the outliers and of the sprites is not what the outputs show."""
    printed = "".join(
        output.text
        for cell in read_tour().cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    )
    aurocs = {name: float(value) for name, value in re.findall(r"^  (\w[\w ]*?) +([\d.]+)$", printed, re.MULTILINE)}
    assert min(aurocs[name] for name in ("noise", "sprites", "shifted")) > 0.9 > aurocs["upside down"]
    assert aurocs["brighter"] < 0.7 and float(re.search(r"([\d.]+)% of the 179", printed)[1]) > 95
    overlaps = [float(word) for word in re.search(r"1 at best: (.*)", printed)[1].split()]
    assert min(overlaps[:4]) > 0.85 > overlaps[5], "ellipses, and a heart"


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """Breaks when a cell fails in docs/, files go elsewhere, a training of seconds learns nothing, or concepts fail."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("ebm", "pretrained"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    tour = read_tour()
    for cell in tour.cells:
        for parameter, small in PARAMETERS.items():
            cell.source = cell.source.replace(parameter, small)
    tour.cells.append(nbformat.v4.new_code_cell(FIGURES))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    place = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3", resources=place).execute()
    assert list_pictures(tour)[:-1] == list_pictures(read_tour())
    accuracy, aurocs, energies, falls, overlaps = json.loads(tour.cells[-1].outputs[-1].text)
    assert accuracy > 0.4 and aurocs["noise"] > 0.99 and falls > 0
    for name in ("3 to 8", "0 to 6"):
        assert energies[f"{name}, after a chain"] < energies[f"{name}, mixtures"]
    assert min(overlaps[:4]) > 0.7, "a random sprite overlaps by 0.1 at most"
    assert not list((tmp_path / "docs").iterdir())
    assert (tmp_path / "cachedir/tour/model_30.pt").exists() and (
        tmp_path / "sandbox_cachedir/tour/energies_between.png"
    ).exists()
