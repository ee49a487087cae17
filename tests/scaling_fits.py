"""The numbers of a scaling fit, made from true laws under C = 6 N D instead of from runs."""

import numpy as np

from pixseq.artifacts.metrics import write_metrics

CHINCHILLA = (1.69, 406.4, 0.34, 410.7, 0.28)
BUDGETS = (1e17, 1e18, 1e19)


def optimum(law):
    """(exponent, coefficient) of N_opt and of D_opt, by the closed form."""
    _, A, alpha, B, beta = law
    a, b = beta / (alpha + beta), alpha / (alpha + beta)
    gain = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return (a, gain / 6**a), (b, 1 / gain / 6**b)


def flops_for(law, value):
    """The compute at which the law comes down to `value`, by the closed form."""
    E, A, alpha, B, beta = law
    gain = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    height = A * gain**-alpha + B * gain**beta
    return 6 * (height / (value - E)) ** ((alpha + beta) / (alpha * beta))


def value_at(law, flops):
    (a, kn), (b, kd) = optimum(law)
    E, A, alpha, B, beta = law
    return E + A * (kn * flops**a) ** -alpha + B * (kd * flops**b) ** -beta


def one_fit(metric, resolution, law, method="varpro", draws=100, spread=0.01, refused=None, seed=0):
    """A metric named accuracy is 1 minus the law. Draws scatter the constants by `spread`, relatively."""
    turned = metric == "accuracy"
    fit = {"metric": metric, "direction": "maximize" if turned else "minimize", "resolution": resolution}
    fit |= {"transform": "1 - accuracy" if turned else None, "method": method, "refused": refused, "flags": []}
    names = ("params_exponent", "params_coefficient", "tokens_exponent", "tokens_coefficient")
    constants = ("E", "A", "alpha", "B", "beta")
    if refused:
        empty = (*names, *constants, "params_exponent_ci", "tokens_exponent_ci", "alpha_ci", "beta_ci", "residual")
        return fit | dict.fromkeys(empty) | {"budgets": [], "draws": {}}
    rng = np.random.default_rng(seed)
    laws = np.array(law) * np.exp(spread * rng.standard_normal((draws, 5)))
    grown = np.array([np.ravel(optimum(each)) for each in (law, *laws)])
    fit |= dict(zip(names, grown[0].tolist())) | {"residual": 0.01}
    fit["draws"] = {name: column.tolist() for name, column in zip(names, grown[1:].T)}
    for name in ("params_exponent", "tokens_exponent"):
        fit[f"{name}_ci"] = np.percentile(fit["draws"][name], [2.5, 97.5]).tolist() if draws else None
    direct = method != "isoflop"
    fit |= dict(zip(constants, law if direct else (None,) * 5)) | {"alpha_ci": None, "beta_ci": None}
    if direct:
        fit["draws"] |= {name: column.tolist() for name, column in zip(constants, laws.T)}
    (a, kn), (b, kd) = optimum(law)
    fit["budgets"] = [
        {
            "flops": flops,
            "params_opt": kn * flops**a,
            "tokens_opt": kd * flops**b,
            "tokens_per_param": kd * flops**b / (kn * flops**a),
            "value_opt": 1 - value_at(law, flops) if turned else value_at(law, flops),
            "curvature": None if direct else 0.05,
            "runs": 5,
            "status": "ok",
        }
        for flops in BUDGETS
    ]
    return fit


def runs_of(laws, budgets=BUDGETS, sizes=5):
    """The runs behind the fits of `laws` {(metric, resolution): law}: sizes around the optimum of the first law."""
    rows = {}
    for (metric, resolution), law in laws.items():
        a, kn = optimum(next(iter(laws.values())))[0]
        for flops in budgets:
            for share in np.geomspace(0.25, 4, sizes):
                params = kn * flops**a * share
                tokens = flops / 6 / params
                row = {"id": None, "resolution": resolution, "budget": flops, "flops": flops}
                row = rows.setdefault((resolution, flops, share), row | {"params": params, "tokens": tokens})
                value = law[0] + law[1] * params ** -law[2] + law[3] * tokens ** -law[4]
                row[metric] = 1 - value if metric == "accuracy" else value
    return list(rows.values())


def numbers_of(laws, fits=None, methods=("varpro",)):
    """What `scaling fit` writes; `fits` None: one for each law and method."""
    if fits is None:
        fits = [one_fit(*where, law, method) for where, law in laws.items() for method in methods]
    bootstrap = {"resamples": 100, "seed": 0, "level": 0.95, "of": {}}
    numbers = {"counting": "6nd", "params_counted": None, "runs": runs_of(laws), "excluded": []}
    return numbers | {"bootstrap": bootstrap, "fits": fits, "disagreements": []}


def write(path, laws, fits=None, methods=("varpro",)):
    write_metrics(path, "scaling fit", {}, {}, numbers_of(laws, fits, methods))
    return path
