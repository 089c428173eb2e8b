"""AGRO where everything can be computed exactly: policies that are tables, groups that are enumerated.

`python -m bench.tabular [--quick] [--json PATH] [--plot PATH]`, half a minute on one core. What it shows, in
float64, with the package's own objectives and autograd:

* `step10` ... `limit`: population gradients with data from the reference, AGRO against four baselines and a
  frozen KL. The setting is that of the convergence figure of arXiv 2503.19612, with a bandit of our own:
  r_k = sin(k + 1), reference logits 0.5 cos k, k = 0..7, beta = 0.5, step size 2 on -grad L / beta;
* `sampled_n*`: the same with sampled groups of 2, 4 and 8, 16 completions a step, quantiles over seeds;
* `behavior_*`: data from the current policy to far away from it;
* `closed_form`: the trajectory against (I - eta beta^2 M)^t (theta_0 - theta*), M = diag(mu) - mu mu^T;
* `two_arms*`: the collapse of the opt-in score term;
* `tree`: completions of up to three tokens, AGRO's sequence form against per-token forms.

`kl_over_start` is KL(pi || pi*) over its value at the start; 0 is the optimum. Providers are objectives:
`ours` (AGRO), `regularized_pg` (KL of the current policy, no baseline), `exact_kl_gradient` (mean reward as
baseline, the true gradient of the KL), `kimi` (mean reward as baseline for r - beta s), `exact_on_policy_pg`
(new data from the current policy at every step), `rloo_frozen_kl` (KL of rollout time).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from agro_lightning.objectives import (
    Agro,
    AgroScoreTerm,
    LossInputs,
    Objective,
    RegularizedPG,
    Rloo,
    RlooFrozenKL,
)
from bench._records import emit, parser, record
from bench._tables import Problem, exact_kl_gradient, expected_gradient, paper_bandit, small_tree, token_form

STEP = 2.0
COMPLETIONS_PER_STEP = 16
Field = Callable[[Tensor], Tensor]
"""From logits to the gradient that is descended."""


def descend(field: Field, problem: Problem, steps: int, start: Tensor | None = None) -> list[Tensor]:
    """The logits before each step and after the last; ends early where nothing moves any more."""
    trail = [problem.reference if start is None else start]
    for _ in range(steps):
        gradient = field(trail[-1])
        trail.append((trail[-1] - STEP * gradient).detach())
        if gradient.abs().max() < 1e-15:
            break
    return trail


def curve(problem: Problem, trail: Sequence[Tensor], steps: int) -> list[float]:
    """KL(pi || pi*) over its start, at steps 0..steps; a trail that came to rest stays where it is."""
    start = problem.kl(problem.reference)
    values = [problem.kl(logits) / start for logits in trail[: steps + 1]]
    return values + values[-1:] * (steps + 1 - len(values))


def paper_fields(problem: Problem, behavior: Tensor | None) -> dict[str, Field]:
    """The methods of the comparison as population gradients under `behavior` (None: the current policy)."""
    beta = problem.beta

    def source(logits: Tensor) -> Tensor:
        return logits if behavior is None else behavior

    def under(objective: Objective) -> Field:
        return lambda logits: expected_gradient(objective, problem, logits, source(logits))

    return {
        "ours": under(Agro(beta)),
        "regularized_pg": under(RegularizedPG(beta, kl_estimator="k2", baseline=False)),
        "exact_kl_gradient": lambda logits: exact_kl_gradient(problem, logits, source(logits)),
        "kimi": under(RegularizedPG(beta, kl_estimator="k2")),  # the mean reward as baseline
        "exact_on_policy_pg": lambda logits: expected_gradient(Rloo(beta), problem, logits, logits),
        "rloo_frozen_kl": under(RlooFrozenKL(beta)),
    }


def figure_records(limit_steps: int = 3000) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """The paper's comparison, data from the reference: records and curves of 100 steps."""
    problem = paper_bandit()
    records = [
        record("tabular", "start", "exact", "optimal_value", problem.value, "reward"),
        record("tabular", "start", "exact", "kl", problem.kl(problem.reference), "nat"),
    ]
    curves = {}
    for provider, field in paper_fields(problem, problem.reference).items():
        trail = descend(field, problem, 1000 if provider == "rloo_frozen_kl" else limit_steps)
        values = curves[provider] = curve(problem, trail, 100)
        for step in (10, 50, 100):
            records.append(record("tabular", f"step{step}", provider, "kl_over_start", values[step], "ratio"))
        if provider == "rloo_frozen_kl":
            spread = [float(trail[step].max() - trail[step].min()) for step in (100, 1000)]
            note = f"diverges: logits {spread[0]:.1f} apart at step 100, {spread[1]:.1f} at step 1000"
            records.append(record("tabular", "limit", provider, "kl_over_start", None, "ratio", note))
        else:
            limit = problem.kl(trail[-1]) / problem.kl(problem.reference)
            records.append(record("tabular", "limit", provider, "kl_over_start", limit, "ratio"))
    return records, curves


def sampled_curves(objective: Objective, n: int, seeds: int, steps: int) -> Tensor:
    """(seeds, steps + 1) KL over its start, with sampled groups of n from the reference, all seeds at
    once."""
    problem = paper_bandit()
    generator = torch.Generator().manual_seed(n)
    logits = problem.reference.expand(seeds, -1).clone()
    groups = COMPLETIONS_PER_STEP // n
    mu, ref = problem.reference.softmax(-1).expand(seeds, -1), problem.logprobs(problem.reference)
    sequence_ids = torch.arange(seeds * COMPLETIONS_PER_STEP)
    values = []
    for _ in range(steps + 1):
        values.append([problem.kl(row[None]) for row in logits])
        picks = torch.multinomial(mu, COMPLETIONS_PER_STEP, replacement=True, generator=generator)
        logits = logits.detach().requires_grad_()
        inputs = LossInputs(
            logprobs=logits.log_softmax(-1).gather(1, picks).flatten(),
            ref_logprobs=ref[picks.flatten()],
            rewards=problem.rewards[picks.flatten()],
            sequence_ids=sequence_ids,
            group_ids=sequence_ids // n,
            num_groups=groups,  # per seed, so that every seed steps as if alone
        )
        loss = objective(inputs).loss
        logits = logits - STEP * torch.autograd.grad(loss, logits)[0]
    return torch.tensor(values, dtype=torch.float64).T / problem.kl(problem.reference)


def sampled_records(seeds: int, steps: int) -> tuple[list[dict[str, Any]], dict[tuple[str, int], Tensor]]:
    """Sampled groups: the median over seeds, and the 10% and 90% quantiles."""
    beta = paper_bandit().beta
    methods: dict[str, Objective] = {
        "ours": Agro(beta),
        "regularized_pg": RegularizedPG(beta, kl_estimator="k2", baseline=False),
        "kimi": RegularizedPG(beta, kl_estimator="k2"),
    }
    records, curves = [], {}
    for (provider, objective), n in itertools.product(methods.items(), (2, 4, 8)):
        values = sampled_curves(objective, n, seeds, steps)
        curves[provider, n] = values
        for step in (10, 100, steps):
            for name, q in (("kl_over_start", 0.5), ("kl_over_start_q10", 0.1), ("kl_over_start_q90", 0.9)):
                value = float(values[:, step].quantile(q))
                case = f"sampled_n{n}/step{step}"
                records.append(record("tabular", case, provider, name, value, "ratio", f"{seeds} seeds"))
    return records, curves


def behavior_records(steps: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Population gradients with data from the current policy, the reference, and further and further away."""
    problem = paper_bandit()
    behaviors = {
        "on_policy": None,
        "reference": problem.reference,
        "uniform": torch.zeros_like(problem.reference),
        "far": problem.reference - problem.rewards / problem.beta,  # prefers what the optimum avoids
        "very_far": problem.reference - 2 * problem.rewards / problem.beta,
    }
    records, curves = [], {}
    for name, behavior in behaviors.items():
        fields = paper_fields(problem, behavior)
        curves[name] = {}
        for provider in ("ours", "regularized_pg", "kimi"):
            values = curve(problem, descend(fields[provider], problem, steps), steps)
            curves[name][provider] = values
            for step in (10, 100, steps):
                case = f"behavior_{name}/step{step}"
                records.append(record("tabular", case, provider, "kl_over_start", values[step], "ratio"))
    return records, curves


def closed_form_records() -> list[dict[str, Any]]:
    """The largest difference, over 100 steps and all logits, between the run and the closed form."""
    problem = paper_bandit()
    trail = descend(paper_fields(problem, problem.reference)["ours"], problem, 100)
    mu = problem.reference.softmax(-1)[0]
    shrink = torch.eye(8, dtype=torch.float64) - STEP * problem.beta * (mu.diag() - torch.outer(mu, mu))
    error, worst = (trail[0] - problem.optimum)[0], 0.0
    for logits in trail:
        gap = (logits - problem.optimum)[0]
        worst = max(worst, float((gap - gap.mean() - error + error.mean()).abs().max()))
        error = shrink @ error
    return [record("tabular", "closed_form", "ours", "max_abs_error", worst, "logit")]


def score_term_records(steps: int) -> list[dict[str, Any]]:
    """Two arms, equal rewards, uniform reference, beta = 1: where the score term leaves the optimum, p =
    1/2."""
    zero = torch.zeros(1, 2, dtype=torch.float64)
    problem = Problem(((0,), (1,)), zero[0], zero, 1.0)

    def field(objective: Objective) -> Field:
        return lambda logits: expected_gradient(objective, problem, logits, logits)

    def logits_at(p: float) -> Tensor:
        return torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)

    low, high = 1e-3, 0.4
    for _ in range(50):
        middle = (low + high) / 2
        falls = field(AgroScoreTerm(1.0))(logits_at(middle))[0, 0] > 0
        low, high = (middle, high) if falls else (low, middle)
    records = [record("tabular", "two_arms", "agro_score_term", "collapse_threshold", low, "probability")]
    for start, (provider, objective) in itertools.product(
        (0.08, 0.09), (("ours", Agro(1.0)), ("agro_score_term", AgroScoreTerm(1.0)))
    ):
        end = descend(field(objective), problem, steps, logits_at(start))[-1].softmax(-1)[0, 0]
        case = f"two_arms_from_{start}/step{steps}"
        records.append(record("tabular", case, provider, "rare_arm", float(end), "probability"))
    return records


def tree_records(steps: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Completions of several tokens, data from the reference."""
    problem = small_tree()
    fields: dict[str, Field] = {"ours": paper_fields(problem, problem.reference)["ours"]}
    for form in ("reward_to_go", "per_token_squared", "mean_log_ratio"):
        fields[form] = lambda logits, form=form: token_form(form, problem, logits, problem.reference)
    records, curves = [], {}
    for provider, field in fields.items():
        curves[provider] = curve(problem, descend(field, problem, steps), steps)
        for step in (10, 100, steps):
            value = curves[provider][step]
            records.append(record("tabular", f"tree/step{step}", provider, "kl_over_start", value, "ratio"))
    return records, curves


COLORS = {
    "ours": "#0b5fa5",
    "regularized_pg": "#d55e00",
    "exact_kl_gradient": "#009e73",
    "kimi": "#b8860b",
    "exact_on_policy_pg": "#7a7a7a",
    "rloo_frozen_kl": "#a3246f",
    "reward_to_go": "#009e73",
    "per_token_squared": "#d55e00",
    "mean_log_ratio": "#b8860b",
}
LABELS = {
    "ours": "AGRO (ours)",
    "regularized_pg": "regularised PG, no baseline",
    "exact_kl_gradient": "mean-reward baseline + exact KL gradient",
    "kimi": "Kimi k1.5 (mean-reward baseline)",
    "exact_on_policy_pg": "exact on-policy PG (fresh data)",
    "rloo_frozen_kl": "KL frozen at rollout",
    "reward_to_go": "reward-to-go log-ratios",
    "per_token_squared": "per-token squared log-ratios",
    "mean_log_ratio": "length-normalised log-ratio",
}


def draw_lines(axes: Axes, curves: dict[str, list[float]], title: str) -> None:
    """One line a method."""
    for provider, values in curves.items():
        wide = 2.4 if provider == "ours" else 1.5
        axes.plot(values, color=COLORS[provider], linewidth=wide, label=LABELS[provider])
    axes.set(title=title, xlim=(0, len(next(iter(curves.values()))) - 1))


def draw_bands(axes: Axes, curves: dict[tuple[str, int], Tensor]) -> None:
    """Median and the band from the 10% to the 90% quantile over seeds."""
    shades = {("ours", 2): "#6baed6", ("ours", 4): "#2b7bba", ("ours", 8): "#08306b"}
    shades |= {("kimi", 4): COLORS["kimi"], ("regularized_pg", 4): COLORS["regularized_pg"]}
    for (provider, n), color in shades.items():
        low, middle, high = curves[provider, n].quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=0)
        axes.fill_between(range(len(middle)), low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(middle, color=color, linewidth=1.6, label=f"{LABELS[provider].split(',')[0]}, n = {n}")
    seeds, places = next(iter(curves.values())).shape
    axes.set(title=f"Sampled groups, 16 completions a step, {seeds} seeds", xlim=(0, places - 1))


def draw_behaviors(axes: Axes, curves: dict[str, dict[str, list[float]]]) -> None:
    """AGRO and one baseline for each source of data."""
    shades = matplotlib.colormaps["viridis"](torch.linspace(0, 0.85, len(curves)).numpy())
    for color, (name, methods) in zip(shades, curves.items(), strict=True):
        axes.plot(methods["ours"], color=color, linewidth=2, label=name.replace("_", " "))
        axes.plot(methods["kimi"], color=color, linewidth=1.2, linestyle=":")
    title = "Where the data comes from: AGRO (solid), Kimi k1.5 (dotted)"
    axes.set(title=title, xscale="log", xlim=(1, len(curves["reference"]["ours"]) - 1))


def plot(
    figure: dict[str, list[float]],
    sampled: dict[tuple[str, int], Tensor],
    behaviors: dict[str, dict[str, list[float]]],
    tree: dict[str, list[float]],
    path: Path,
) -> None:
    """Four panels of KL(pi || pi*) over its start against steps, written to `path`."""
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**style, "axes.titlesize": 10, "axes.axisbelow": True}):
        canvas = Figure(figsize=(11, 8), layout="constrained")
        (first, second), (third, fourth) = canvas.subplots(2, 2)
        draw_lines(first, figure, "Population gradient, data from the reference")
        draw_bands(second, sampled)
        draw_behaviors(third, behaviors)
        draw_lines(fourth, tree, "Completions of up to three tokens, data from the reference")
        for axes, floor in ((first, 1e-9), (second, 1e-15), (third, 1e-15), (fourth, 1e-12)):
            axes.set(yscale="log", ylim=(floor, 10), xlabel="steps", ylabel="KL(π‖π*) / start")
            axes.grid(color="#e6e6e6", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        canvas.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the table, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the curves into this file")
    chosen = options.parse_args(arguments)
    seeds, steps = (8, 300) if chosen.quick else (40, 1000)
    figure, figure_curves = figure_records()
    sampled, sampled_curves_ = sampled_records(seeds, steps=200)
    behaviors, behavior_curves = behavior_records(steps)
    tree, tree_curves = tree_records(steps)
    records = [*figure, *sampled, *behaviors, *closed_form_records(), *score_term_records(steps=300), *tree]
    emit(records, chosen.json)
    if chosen.plot is not None:
        plot(figure_curves, sampled_curves_, behavior_curves, tree_curves, chosen.plot)


if __name__ == "__main__":
    main()
