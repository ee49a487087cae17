"""A forecast counts pictures by the tokens that the study's own family and scheme make of one."""

import numpy as np
import pytest
from conftest import write_pixels, write_tokens

from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.studies import fit, forecast, plan
from pixseq.studies.study import open_study


@pytest.mark.parametrize(
    ("scheme", "shapes", "per_image"),
    [("palette", "", 36), ("rgb", "", 108), ("pixels", "shapes: {family: aim, patch_size: 2, head_depth: 1}\n", 16)],
    ids=["palette", "rgb", "patches"],
)
def test_a_study_carries_its_tokens_an_image_into_fit_and_forecast(tmp_path, scheme, shapes, per_image):
    for name, seed in (("t", 0), ("v", 1)):
        if scheme == "pixels":
            write_pixels(tmp_path / f"{name}.zarr", seed=seed)
        else:
            write_tokens(tmp_path / f"{name}.zarr", seed=seed, scheme=scheme)
    data = f"data: {{train: {tmp_path}/t.zarr, val: {tmp_path}/v.zarr}}\n"
    (tmp_path / "grid.yaml").write_text(f"{data}budgets: [1.0e+11, 3.0e+11, 1.0e+12]\nsizes_per_budget: 6\n{shapes}")
    plan.run(tmp_path / "grid.yaml", tmp_path / "plan", timed=False)
    study = open_study(tmp_path / "plan")
    for cell in study.cells:
        loss = 1 + 20 * cell.params**-0.3 + 20 * cell.tokens**-0.3
        write_metrics(
            study.folder(cell) / "result.json",
            "scaling run",
            cell.to_json(),
            {},
            {"status": "done", "reason": None, "loss": loss},
        )
    side = study.cells[0].resolution
    fit.run(tmp_path / "plan", tmp_path / "fit.json", metrics=["loss"], resamples=0)
    numbers = read_metrics(tmp_path / "fit.json")[1]
    assert numbers["tokens_per_image"] == {str(side): per_image} and numbers["counting"] == "exact"
    found = forecast.run(tmp_path / "fit.json", 4.5, 1e15, [side], targets={"loss": 1.2})
    (row,) = found["rows"]
    assert row["images"] == pytest.approx(row["tokens"] / per_image)
    assert any(f"as in the study ({per_image} at {side}x{side})" in line for line in found["assumptions"])
    assert np.isfinite(row["images"]) and found["counting"] == "exact"
