"""Tables that are made, not typed: of the solvers' cards, and of records of measurements."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep as fs
from experiments import (
    benchmarks,
    brownian_figures,
    brownian_speed,
    sfddm_digits,
    sfddm_mnist,
    sigdeg_ablation,
    sigdeg_features,
    sigdeg_mixture,
    sigdeg_order,
)
from fewstep_analysis import Record
from fewstep_analysis import sampler_work as diffusion_work
from fewstep_analysis import solver_table as cards
from fewstep_analysis.cli.app import helps

DOCS = Path(__file__).parent
DEMO = DOCS / "records" / "demo.json"
ORDER = DOCS / "records" / "sigdeg-order.json"
MIXTURE = DOCS / "records" / "sigdeg-mixture.json"
ABLATION = DOCS / "records" / "sigdeg-ablation.json"


def record(name: str) -> Record:
    """A record of this checkout."""
    return Record.load(DOCS / "records" / f"{name}.json")


def records() -> str:
    """What made each record: the command, the commit of the code, the versions, the machine."""
    lines = ["| record | command | seed | code at | on |", "| --- " * 5 + "|"]
    seen: dict[str, list[str]] = {}
    for file in sorted((DOCS / "records").glob("*.json")):
        one = Record.load(file)
        made, versions = one.made, one.made["versions"]
        shown = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("fewstep", "numpy", "scipy"))
        on = f"{made['device']}, threads: {made['threads']}"
        seen.setdefault(shown, []).append(file.name)
        cells = [f"`{file.name}`", f"`{made['command']}`", one.seed, f"`{made['commit']}`", on]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = max(seen, key=lambda v: len(seen[v]))
    others = [f"{', '.join(names)}: {v}" for v, names in seen.items() if v != versions]
    return "\n".join([*lines, "", f"Versions: {'; '.join([versions, *others])}."])


def headline() -> str:
    """Every estimate of the headline: the fit, its levels, the local slopes."""
    lines = ["| solver | noise | declared | fitted slope | levels fitted | local slopes, coarse to fine |"]
    lines += ["| --- " * 6 + "|"]
    for e in record("headline-orders").data["estimates"]:
        fitted = f"{e['order']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"
        levels, local = f"{min(e['used'])} to {max(e['used'])}", " ".join(f"{v:.2f}" for v in e["local"])
        cells = [f"`{e['solver']}`", e["noise_type"], f"{e['declared']:.1f}", fitted, levels, local]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def references() -> str:
    """What each solver is and where it stands in the literature."""
    lines = ["| solver | what it is | source |", "| --- | --- | --- |"]
    lines += [f"| `{n}` | {c.card.summary} | {c.card.reference} |" for n, c in fs.solvers().items()]
    return "\n".join(lines)


def names(stochastic: bool) -> str:
    """The solvers' own documentation, for the page of names."""
    found = [n for n, c in fs.solvers().items() if issubclass(c, fs.StochasticSolver) == stochastic]
    return documented("autoclass", found)


def documented(directive: str, found: list[str]) -> str:
    """The docstrings of names of the public surface."""
    lines = ["```{eval-rst}", ".. currentmodule:: fewstep", *(f".. {directive}:: {n}" for n in found)]
    return "\n".join([*lines, "```"])


def public(test: Callable[[object], bool]) -> list[str]:
    """Names of the public surface whose value passes the test."""
    return [name for name, value in vars(fs).items() if name[0] != "_" and test(value)]


def schedules() -> str:
    """Each schedule with the first sentence of its docstring."""
    lines = ["| schedule | process |", "| --- | --- |"]
    for name in public(lambda v: isinstance(v, type) and issubclass(v, fs.Schedule) and v is not fs.Schedule):
        first = " ".join(inspect.getdoc(getattr(fs, name)).split("\n\n")[0].split())
        safe = re.sub(r"([*|])", r"\\\1", first)
        lines.append(f"| `{name}` | {safe} |")
    return "\n".join(lines)


def schedule_names() -> str:
    """The schedules' own documentation."""
    found = public(lambda v: isinstance(v, type) and issubclass(v, fs.Schedule) and v is not fs.Schedule)
    return documented("autoclass", found)


def borders() -> str:
    """The conversions to the one convention, and what else stands at the border."""
    found = public(lambda v: callable(v) and getattr(v, "__module__", "") == "fewstep.denoiser")
    return documented("autofunction", found)


def demo() -> str:
    """The record's table: distance to held-out real digits, evaluations, seconds."""
    if not DEMO.exists():
        return "The record of the demo is not part of this checkout: run `fewstep demo`."
    lines = ["| sampler | network evaluations | sliced W2 to held-out digits | seconds for 1,000 digits |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in Record.load(DEMO).data["table"]:
        made = bool(row["evaluations"])
        cells = [row["sampler"], row["evaluations"] if made else "-", f"{row['sliced_w2']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['seconds']:.3f}" if made else "-"])) + " |")
    return "\n".join(lines)


def work(problem: str) -> str:
    """RMSE against evaluations of one problem, on the grid even in log sigma."""
    record = Record.load(DOCS / "records" / f"work-precision-{problem}.json")
    text = diffusion_work.table(record, spacing="logsnr")
    return text.replace("| logsnr ", "").replace("| spacing ", "").replace("---|", "", 1)


def spacings(evaluations: int = 10, digits: str = ".2g") -> str:
    """RMSE of the solvers that can spend just so many evaluations, a column for each problem and grid."""
    columns = [(p, s) for p in ("ring", "smooth") for s in diffusion_work.SPACINGS]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for problem in ("ring", "smooth"):
        for s in Record.load(DOCS / "records" / f"work-precision-{problem}.json").data["series"]:
            known = dict(zip(s["nfe"], s["rmse"]))
            if s["by"] == "fewstep" and evaluations in known:
                cell = format(known[evaluations], digits)
                found.setdefault(s["name"], {})[problem, s["spacing"]] = cell
    lines = ["| solver | " + " | ".join(f"{p}, {s}" for p, s in columns) + " |"]
    lines += ["| --- " * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cells[c] for c in columns) + " |"
        for name, cells in found.items() if all(c in cells for c in columns)
    ]  # fmt: skip
    return "\n".join(lines)


def overhead() -> str:
    """Time of a sampling loop over that of a bare loop of the same arithmetic."""
    record = Record.load(DOCS / "records" / "sampler-overhead.json")
    lines = ["| shape | solver | steps | bare loop, µs a step | fewstep | scheduler | diffusers |"]
    lines += ["| --- " * 7 + "|"]
    for r in record.data["rows"]:
        cells = [r["shape"], r["solver"], r["steps"], f"{r['bare_us_per_step']:.0f}"]
        cells += [f"{r['fewstep_ratio']:.2f}", f"{r['scheduler_ratio']:.2f}", f"{r['diffusers_ratio']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    made, versions = record.made, record.made["versions"]
    machine = f"{made['device']}, threads: {made['threads']}"
    machine += f"; torch {versions['torch']}, Python {versions['python']}"
    return "\n".join([*lines, "", f"*Measured on: {machine}.*"])


def dode(problem: str) -> str:
    """RMSE of every base and way of fitting at 5, 8 and 10 evaluations, and the best against the best."""
    rows = Record.load(DOCS / "records" / f"dode-{problem}.json").data["rows"]
    kinds = ("untrained", "greedy, 1 term", "greedy, 3 terms", "global, 3 terms", "grid and weights")
    fitted = [r for r in rows if r["kind"] in kinds]
    bases = list(dict.fromkeys(r["base"] for r in fitted if r["kind"] == "greedy, 1 term"))
    lines = ["| base | " + " | ".join(kinds) + " |", "| --- " * (len(kinds) + 1) + "|"]
    for base in bases:
        found = {(r["kind"], r["budget"]): r for r in fitted if r["base"] == base}
        cells = [[_cell(found, k, n) for n in (5, 8, 10)] for k in kinds]
        lines.append(f"| {base} | " + " | ".join(" / ".join(c) if any(c) else "-" for c in cells) + " |")
    if problem == "ring":
        grids = [r["seconds"] for r in fitted if r["kind"] == kinds[-1] and r["budget"] in (5, 8, 10)]
        return "\n".join(
            [*lines, "", f"Grid and weights took {min(grids):.0f} to {max(grids):.0f} CPU seconds."]
        )
    lines += ["", "| evaluations | best untrained | best learned | ratio |", "| --- " * 4 + "|"]
    for n in sorted({r["budget"] for r in rows}):
        pair = [
            min((r for r in rows if r["budget"] == n and test(r)), key=lambda r: r["rmse"])
            for test in (lambda r: "untrained" in r["kind"], lambda r: "untrained" not in r["kind"])
        ]
        said = [f"{pair[0]['rmse']:.2g} ({pair[0].get('which', pair[0]['base'])})"]
        said += [f"{pair[1]['rmse']:.2g} ({pair[1]['kind']})", f"{pair[0]['rmse'] / pair[1]['rmse']:.1f}"]
        lines.append(f"| {n} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def dode_mnist() -> str:
    """RMSE of the untrained families and of the fits on MNIST; the best against the best."""
    data = record("dode-mnist").data
    counts = data["counts"]
    lines = ["| solver | " + " | ".join(map(str, counts)) + " |", "| --- " * (len(counts) + 1) + "|"]
    found = {(r["base"], r["kind"], r["budget"]): r for r in data["rows"]}
    even, any_grid = "best untrained, even grids", "best untrained"
    words = {even: "best of log sigma, Karras, time", any_grid: "and trailing"}
    for base, kind in dict.fromkeys((r["base"], r["kind"]) for r in sorted(data["rows"], key=_rank)):
        cells = []
        for n in counts:
            row, bare = found[base, kind, n], found.get((base, "untrained", n))
            same = kind != "untrained" and bare is not None and row["rmse"] == bare["rmse"]
            said = f" ({row['which']})" if "which" in row else ""
            cells.append("base" if same else f"{row['rmse']:.2g}{said}")
        name = f"{base}, {words[kind]}" if kind in words else f"{base}, trailing: {kind}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for kind, name in ((even, "best untrained on even grids"), (any_grid, any_grid)):
        gains = " | ".join(f"{data['gains'][kind][str(n)]:.2f}" for n in counts)
        lines.append(f"| *{name} / best learned* | {gains} |")
    spent = [
        " / ".join(f"{found['IPNDM(2)', k, n]['seconds']:.0f}" for n in counts)
        for k in ("greedy, 1 term", "grid and weights")
    ]
    said = f"One number a step took {spent[0]} CPU seconds to fit, grid and weights {spent[1]}."
    return "\n".join([*lines, "", said])


def _rank(row: dict[str, Any]) -> int:
    kinds = ("best untrained, even grids", "best untrained")
    return kinds.index(row["kind"]) if row["kind"] in kinds else len(kinds)


def dode_frechet() -> str:
    """Distances of 500 images to the training images."""
    found = record("dode-mnist").data["frechet"]
    lines = ["| images | Fréchet distance |", "| --- | --- |"]
    lines += [f"| {name} | {value:.3f} |" for name, value in found.items() if name != "samples"]
    return "\n".join(lines)


def dode_population() -> str:
    """How far the fitted kappa is from the population's."""
    found = record("dode-gaussian").data["population"]
    said = ", ".join(f"{100 * r['median']:.2g} % ({r['start_states']} start states)" for r in found)
    return (
        f"The fitted $\\kappa$ of DDIM at 10 evaluations lies {said} from the population's optimum, in the "
        "median over rows."
    )


def dode_cost() -> str:
    """Seconds and bytes of a fit."""
    small, large = record("dode-digits").data["cost"], record("dode-mnist").data["cost"]
    by = {int(k): v / 1e6 for k, v in small["sampling_bytes_by_batch"].items()}
    return (
        f"For 10 steps on the digits teacher, a small network, with {small['start_states']} start states: "
        f"{small['seconds']:.1f} s; at most {small['fit_bytes'] / 1e6:.2f} MB of tensors, sampling them "
        f"{by[max(by)]:.2f} MB at once and {by[min(by)]:.2f} MB in these batches. For the MNIST U-Net, whose "
        f"activations outweigh its images, with {large['start_states']} start states: "
        f"{large['fit_bytes'] / 1e6:.1f} MB, and {large['sampling_bytes'] / 1e6:.1f} MB in these batches."
    )


def _cell(found: dict[tuple[str, int], Any], kind: str, n: int) -> str:
    row, bare = found.get((kind, n)), found.get(("untrained", n))
    if row is None:
        return ""
    same = kind != "untrained" and bare is not None and row["rmse"] == bare["rmse"]
    return "base" if same else f"{row['rmse']:.2g}"


def sfddm(problem: str) -> str:
    """The study's table, and its pictures where they are there."""
    record, study = DOCS / "records" / f"sfddm-{problem}.json", {"digits": sfddm_digits, "mnist": sfddm_mnist}
    if not record.exists():
        return f"The record is not part of this checkout: run `fewstep study sfddm-{problem}`."
    pictures = {
        f"sfddm-{problem}.svg": "Distance against steps, and against what training cost",
        f"sfddm-{problem}.png": "Digits of the same noise, a row a sampler",
        f"sfddm-{problem}-arc.png": "Digits along an arc between two noises, a row a sampler",
    }
    shown = [f"![{alt}](figures/{n})" for n, alt in pictures.items() if (DOCS / "figures" / n).exists()]
    return "\n\n".join([study[problem].markdown(Record.load(record)), *shown])


def volatility() -> str:
    """For each parameter set the error of each sampler in each statistic, and student over teacher."""
    data, parts = Record.load(DOCS / "records" / "sigdeg-volatility.json").data, []
    for found in data["sets"].values():
        model, errors = found["model"], found["errors"]
        parts += [f"H = {model['hurst']:g}, η = {model['eta']:g}, ρ = {model['rho']:g}:", ""]
        heads = [f"{name}, {n}" for name, n in data["evaluations"].items()]
        parts += [f"| statistic | exact | {' | '.join(heads)} | ratio | |", "| --- " * (len(heads) + 4) + "|"]
        for name, ratio in found["ratio"].items():
            cells = [f"{errors[sampler][name]['error']:.2g}" for sampler in ("exact", *data["evaluations"])]
            parts.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} | {found['verdict'][name]} |")
        parts.append("")
    return "\n".join(parts)


def mnist_students() -> str:
    """The samplers of MNIST by their distances."""
    rows = Record.load(DOCS / "records" / "sigdeg-mnist.json").data["rows"]
    lines = ["| sampler | evaluations | Fréchet | kernel x 1000 | class score | right class | std |",
             "| --- " * 7 + "|"]  # fmt: skip
    for r in rows:
        lines.append(
            f"| {r['sampler']} | {r['evaluations'] or ''} | {r['frechet']:.3f} | {1000 * r['kernel']:.2f} | "
            f"{r['score']:.2f} | {r['right']:.1%} | {r['std']:.3f} |"
        )
    return "\n".join(lines)


def commands() -> dict[str, str]:
    """The help of each command as a terminal shows it."""
    return {f"cli-{path.replace(' ', '-')}": f"```text\n{text}\n```" for path, _, text in helps()}


def write(folder: Path) -> None:
    """The tables as files that the pages include."""
    folder.mkdir(exist_ok=True)
    pictures = {
        "digits": "Digits of the teacher, the coarse sampler and the student, and real ones",
        "demo-convergence": "Strong errors of Euler-Maruyama, Milstein and a learned step",
    }
    there = {k: v for k, v in pictures.items() if (DOCS / "figures" / f"{k}.png").exists()}
    shown = "".join(f"![{alt}](figures/{name}.png)\n\n" for name, alt in there.items())
    made = {
        "cards": cards.markdown(cards.rows()), "references": references(), "demo": shown + demo(),
        "api-sde": names(True), "api-diffusion": names(False),
        "api-border": borders(), "schedules": schedules(), "api-schedules": schedule_names(),
        "brownian-orders": brownian_figures.orders_table(record("brownian-figures")),
        "brownian-speed": brownian_speed.markdown(record("brownian-speed")),
        "headline-orders": headline(),
        "benchmarks": benchmarks.markdown(record("benchmarks")), "records": records(),
        "work-ring": work("ring"), "work-smooth": work("smooth"), "work-spacings": spacings(),
        "sampler-overhead": overhead(),
        "sigdeg-order": sigdeg_order.table(ORDER), "sigdeg-order-finer": sigdeg_order.finer_table(ORDER),
        "sigdeg-volatility": volatility(), "sigdeg-mnist": mnist_students(),
        "sigdeg-mixture": sigdeg_mixture.table(MIXTURE),
        "sigdeg-features": sigdeg_features.features_table(MIXTURE),
        **{f"sigdeg-ablation-{p}": sigdeg_ablation.table(ABLATION, p) for p in ("mixture", "digits")},
        "dode-mnist": dode_mnist(), "dode-frechet": dode_frechet(), "dode-population": dode_population(),
        "dode-cost": dode_cost(),
        **{f"dode-{p}": dode(p) for p in ("ring", "gaussian", "smooth", "digits")},
        **{f"sfddm-{p}": sfddm(p) for p in ("digits", "mnist")}, **commands(),
    }  # fmt: skip
    for name, text in made.items():
        (folder / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    write(DOCS / "_generated")
