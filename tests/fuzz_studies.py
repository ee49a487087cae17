"""Plans, results, fits and tables of scaling studies, for fuzz.py: a sound example of each, and what reads it."""

import contextlib
import json
import shutil

import numpy as np
from conftest import write_tokens
from scaling_fits import CHINCHILLA, write

GRID = """
data: {train: KEPT/t.zarr, val: KEPT/v.zarr}
budgets: [1.0e+9, 2.0e+9, 4.0e+9]
sizes_per_budget: 3
completions: {count: 4}
probe: {c: '1', layers: '1'}
batch: {steps: 4, smallest: 4}
"""


def planned(kept):
    """A plan in `kept`, on stores beside it."""
    from pixseq.studies import plan

    write_tokens(kept / "t.zarr", count=24)
    write_tokens(kept / "v.zarr", count=16, seed=1)
    (kept / "g.yaml").write_text(GRID.replace("KEPT", str(kept)))
    plan.run(kept / "g.yaml", kept / "plan", timed=False)
    return kept / "plan"


def signed(path):
    """Give a plan the content id of its cells, as a stranger who means it would."""
    from pixseq.artifacts.plan import _id
    from pixseq.errors import PixseqError

    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, PixseqError, RecursionError):
        record = json.loads((path / "manifest.json").read_text())
        record["id"] = _id(record["cells"])
        (path / "manifest.json").write_text(json.dumps(record))


def finished(path):
    """Results of every cell, as if each had been run."""
    from pixseq.artifacts.metrics import write_metrics
    from pixseq.studies.study import DONE, open_study

    study = open_study(path)
    for i, cell in enumerate(study.cells):
        study.folder(cell).mkdir(parents=True)
        numbers = {
            "status": DONE,
            "reason": None,
            "loss": 2.5 - 0.1 * (i % 3) + 0.02 * i,
            "loss_unit": "nats_per_token",
        }
        numbers |= {"accuracy": 0.3 + 0.01 * i, "frechet_distance": 3.0 - 0.1 * i, "frechet_n": 4, "frechet_floor": 0.1}
        numbers |= {"loss_unit": "nats_per_token", "frechet_floor_n": 4, "frechet_extractor": "reference"}
        write_metrics(
            study.folder(cell) / "result.json", "scaling run", cell.to_json(), {"plan": study.reference}, numbers
        )


def plan(folder, kept):
    """All cells of which are done."""
    finished(planned(kept))
    shutil.copytree(kept / "plan", folder / "plan")

    def read(folder):
        from pixseq.stages import show
        from pixseq.studies import run
        from pixseq.studies.run_table import read as read_runs

        signed(folder / "plan")
        show.run(folder / "plan", verify=True)
        run.run(folder / "plan", budget_limit=1.0)
        read_runs(folder / "plan", None)

    return (
        read,
        "scaling fit HERE/plan --bootstrap 0 -o OUT",
        "scaling run HERE/plan --budget-limit 1 --json",
        "scaling run HERE/plan --cell r6-b0-s0",
        "scaling plan KEPT/g.yaml --recentre --no-calibrate -o HERE/plan",
        "show HERE/plan --verify",
    )


def cell(folder, kept):
    """One that was run, and whose result is made again of what stands in its folder."""
    from pixseq.studies import cell as one
    from pixseq.studies.study import open_study

    study = open_study(planned(kept))
    first = study.cells[0]
    one.run(study, first)
    cell = study.folder(first)
    (cell / "result.json").unlink()
    for path in cell.iterdir():
        shutil.move(path, folder / path.name) if path.suffix == ".json" else None
    names = [path.name for path in folder.iterdir()]

    def read(folder):
        for name in names:
            (cell / name).unlink(missing_ok=True)
            if (folder / name).exists():
                shutil.copy(folder / name, cell / name)
        try:
            one.run(study, first)
        finally:
            (cell / "result.json").unlink(missing_ok=True)

    return read


def waiting(folder, kept):
    """The cells of which are trained by what the plan says of them, as far as their shapes."""
    planned(kept)
    shutil.copytree(kept / "plan", folder / "plan")

    def read(folder):
        from pixseq.engine.image_store import open_images
        from pixseq.stages import pretrain
        from pixseq.studies import judge, ladder
        from pixseq.studies.study import check_parents, open_study

        signed(folder / "plan")
        study = open_study(folder / "plan")
        check_parents(study)
        judge.references(study)
        for each in study.cells[:2]:
            recipe = ladder.recipe_of(study.grid, each)
            pretrain.model_shape(recipe, open_images(study.data(each).train, "tokens"))

    return read


LAWS = {("loss", 32): CHINCHILLA, ("accuracy", 32): (0.1, 40.0, 0.4, 60.0, 0.35), ("loss", 64): CHINCHILLA}
LAWS |= {("frechet_distance", 32): (0.5, 300.0, 0.3, 500.0, 0.25)}
FORECAST = "--growth 4.5 --start-flops 1e20 --resolution 32,128"


def fit(folder, kept):
    from scaling_fits import one_fit

    fits = [one_fit(*where, law, method, draws=24) for where, law in LAWS.items() for method in ("varpro", "isoflop")]
    write(folder / "fit.json", LAWS, fits)

    def read(folder):
        from pixseq.stages import show
        from pixseq.studies import compare, forecast

        for method in ("varpro", "isoflop"):
            compare.run(folder / "fit.json", method=method, images=1e6)
        forecast.run(folder / "fit.json", 4.5, 1e20, "32,128")
        show.run(folder / "fit.json")

    return (
        read,
        "scaling compare HERE/fit.json -o OUT",
        "scaling compare HERE/fit.json --images 1e6 --budget 1e20 --json",
        f"scaling forecast HERE/fit.json {FORECAST} -o OUT",
        f"scaling forecast HERE/fit.json {FORECAST} --target loss=2 --json",
    )


def fit_of_runs(folder, kept):
    """A fit.json as the stage writes it, with outliers, floors and disagreements."""
    from pixseq.studies import fit

    finished(planned(kept))
    fit.run(kept / "plan", folder / "fit.json", resamples=20)

    def read(folder):
        from pixseq.studies import compare, forecast

        compare.run(folder / "fit.json", method="isoflop")
        compare.run(folder / "fit.json")
        forecast.run(folder / "fit.json", 4.5, 1e20, "6,12")

    return read, "scaling compare HERE/fit.json", f"scaling forecast HERE/fit.json {FORECAST}"


def table(folder, kept):
    rng = np.random.default_rng(0)
    lines = ["params,tokens,flops,loss,accuracy,resolution,seed,name"]
    for flops in (1e9, 1e10, 1e11):
        for i, size in enumerate(np.geomspace(0.3, 3, 4)):
            params = size * (flops / 6) ** 0.5
            loss = 1.5 + 40 * params**-0.35 + 60 * (flops / 6 / params) ** -0.35 + 0.001 * rng.normal()
            lines.append(f"{params:.0f},{flops / 6 / params:.0f},{flops:.4g},{loss:.4f},{1 / loss:.4f},8,{i % 2},r{i}")
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")

    def read(folder):
        from pixseq.studies.run_table import read as read_runs

        read_runs(folder / "runs.csv", None)

    return (
        read,
        "scaling fit HERE/runs.csv --bootstrap 0 -o OUT",
        "scaling fit HERE/runs.csv --bootstrap 0 --metric loss --json",
    )


KINDS = (plan, cell, waiting, fit, fit_of_runs, table)
