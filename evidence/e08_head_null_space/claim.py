"""E8: the part of a hidden state that the LM head ignores, and how much training reduces it."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evidence.claim import Finding, Result, Work
from evidence.comparisons import first_seeds
from evidence.e01_accuracy.claim import SHARED, baseline
from evidence.pictures import name_rows
from evidence.words import listed, percent, table
from oprd import Sampling, TransformersEngine, capture_states
from oprd.models.lm_head import divergence, lm_head_of
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.runs.pictures import INK, MARKERS, colour, in_percent, look, plain_log
from oprd.tasks.task import get_task
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.diagnose.theory import centred_gram

ID = "E8"
TITLE = "The full KL leaves differences between hidden states that the LM head hardly sees; OPRD reduces them"
CLAIM = (
    "State differences in N_W = {Δh : W Δh ∝ 1} do not change any output-space loss; along the head's smallest singular direction |Δh|²/loss "
    "grows as (σ_1/σ_d)² (paper, Theorem 2)."
)
SETTING = (
    "LM heads of SmolLM2-135M-Instruct (49,152 × 576) and of the embedded student (17 × 128), minus their mean row, which softmax ignores. "
    "SmolLM2's states on 32 tokens after each of eight prompts, moved by 5 % of their length along singular directions. Embedded pair: E1's "
    "models of seeds 0 to 2 on 128 rollouts of their own."
)
ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
STEP = 0.05
PLACES = {"1st": 0.0, "2nd": 1e-9, "1/64": 1 / 64, "1/8": 1 / 8, "1/2": 1 / 2, "7/8": 7 / 8, "last": 1.0}
PROMPTS = (
    "The capital of France is", "Write a short poem about the sea.", "def fibonacci(n):", "Explain why the sky is blue.",
    "Once upon a time", "What is 17 times 23?", "The three laws of motion are", "Dear Sir or Madam,",
)  # fmt: skip


def measure(work: Work) -> dict[str, Any]:
    """Spectra, small moves along singular directions, and the remaining difference of trained students."""
    if not (SMOLLM2 / "config.json").exists():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "get_smollm2.py"), "--output", str(SMOLLM2)], check=True)
    model = load_model(str(SMOLLM2), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(SMOLLM2))
    states_ND = own_states(model, tokenizer, 8 if work.quick else 32)
    moved = move_along(model, states_ND)
    tiny = load_model("embedded:tiny/student", dtype=torch.float32).eval()
    spectra = {"SmolLM2-135M-Instruct": spectrum(model), "embedded student": spectrum(tiny)}
    seeds = first_seeds(work, 3)
    rates, records = baseline(work, ("representation", "full_reverse_kl"), seeds)
    left = [
        {
            "objective": r["objective"],
            "seed": r["seed"],
            "final": r["final"],
            **left_over(_model_of(work, r), r["seed"], work),
        }
        for r in records
    ]
    before = left_over("embedded:tiny/student", seeds[0], work)
    return {
        "spectra": spectra,
        "moved": moved,
        "states": len(states_ND),
        "left": left,
        "before": before,
        "rates": rates,
    }


def _model_of(work: Work, record: dict[str, Any]) -> str:
    runs = work.folder.parent / SHARED / "runs"
    return str(runs / record["objective"] / f"lr_{record['learning_rate']!r}" / f"seed_{record['seed']}" / "model")


@torch.no_grad()
def own_states(model: nn.Module, tokenizer: Any, tokens: int) -> Tensor:
    """`[N, D]`: states after the final norm at the tokens that the model generates after each prompt."""
    engine = TransformersEngine(tokenizer, stop_token_ids(model, tokenizer))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rollouts = engine.generate(model, prompts, num_generations=1, sampling=Sampling(tokens), seed=0).rollouts
    return capture_states(model, rollouts, "last").values[0]


@torch.no_grad()
def directions(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Singular values `[D]` and right singular directions `[D, D]` (columns) of the head without its mean row, largest first."""
    squares_D, vectors_DD = torch.linalg.eigh(centred_gram(lm_head_of(model)))
    return squares_D.flip(0).clamp_min(0).sqrt(), vectors_DD.flip(1)


def spectrum(model: nn.Module) -> dict[str, Any]:
    """Width, directions with an effect, their σ_1/σ_d, effective rank exp(entropy of σ²), 64 values of σ/σ_1."""
    values_D, _ = directions(model)
    seen_D = values_D[values_D.square() > values_D[0].square() * 1e-10]
    share_D = seen_D.square() / seen_D.square().sum()
    at = torch.linspace(0, len(values_D) - 1, 64).round().long()
    return {
        "width": len(values_D), "seen": len(seen_D), "condition": round(float(seen_D[0] / seen_D[-1]), 3),
        "effective_rank": round(float(torch.exp(-(share_D * share_D.log()).sum())), 2),
        "index": (at + 1).tolist(), "sigma": [float(f"{float(values_D[i] / values_D[0]):.4g}") for i in at],
    }  # fmt: skip


@torch.no_grad()
def move_along(model: nn.Module, states_ND: Tensor) -> list[dict[str, Any]]:
    """Move every state by `STEP` of its length along singular directions: exact KL, second-order KL, |Δh|²/KL."""
    head = lm_head_of(model)
    values_D, vectors_DD = directions(model)
    weight_VD = head.weight[: head.rows].double() * head.scale
    rows = []
    for name, share in PLACES.items():
        index = min(max(round(share * (len(values_D) - 1)), 1 if name == "2nd" else 0), len(values_D) - 1)
        length_N = STEP * states_ND.norm(dim=-1)
        moved_ND = states_ND + length_N[:, None] * vectors_DD[:, index].to(states_ND.dtype)
        # Double precision: along the last directions the KL is near float32's rounding.
        kl_N = torch.cat([
            divergence(_double(head), own.double(), _double(head), other.double(), "forward_kl")
            for own, other in zip(states_ND.split(64), moved_ND.split(64), strict=True)
        ])  # fmt: skip
        along_V = weight_VD @ vectors_DD[:, index]
        second_N = (
            torch.cat([_variance(own, weight_VD, along_V) for own in states_ND.split(64)])
            / 2
            * length_N.double().square()
        )
        rows.append({
            "place": name, "index": index + 1, "sigma": float(values_D[index] / values_D[0]), "kl": float(kl_N.mean()),
            "second_order": float(second_N.mean()), "ratio": float(length_N.double().square().mean() / kl_N.mean()),
        })  # fmt: skip
    return [
        {key: value if isinstance(value, str | int) else float(f"{value:.5g}") for key, value in row.items()}
        for row in rows
    ]


def _double(head: Any) -> Any:
    from dataclasses import replace

    return replace(head, weight=head.weight.detach().double())


def _variance(states_nD: Tensor, weight_VD: Tensor, along_V: Tensor) -> Tensor:
    """Var_{v~p}(w_v·d) at each state: dᵀ Wᵀ(diag p − ppᵀ)W d, twice the second-order KL of a unit step along d."""
    p_nV = (states_nD.double() @ weight_VD.T).softmax(-1)
    return (p_nV @ along_V.square()) - (p_nV @ along_V).square()


@torch.no_grad()
def left_over(name: str, seed: int, work: Work) -> dict[str, float]:
    """Distance of a student's last states to its teacher's on its own rollouts, in and outside the head's row space; mean KL."""
    student = load_model(name, dtype=torch.float32).eval()
    teacher = load_model("embedded:tiny/teacher", dtype=torch.float32).eval()
    tokenizer = load_tokenizer("embedded:tiny/student")
    problems = get_task("addition").problems
    assert problems is not None
    prompts = [tokenizer(row.prompt)["input_ids"] for row in problems(16 if work.quick else 128, seed, "test")]
    engine = TransformersEngine(tokenizer, stop_token_ids(student, tokenizer))
    rollouts = engine.generate(student, prompts, num_generations=1, sampling=Sampling(64), seed=seed).rollouts
    own_ND, their_ND = (capture_states(model, rollouts, "last").values[0] for model in (student, teacher))
    values_D, vectors_DD = directions(student)
    seen = int((values_D.square() > values_D[0].square() * 1e-10).sum())
    along_ND = (own_ND - their_ND).double() @ vectors_DD
    power = float(their_ND.double().square().sum(1).mean())
    kl_N = divergence(lm_head_of(student), own_ND, lm_head_of(teacher), their_ND, "reverse_kl")
    parts = {"seen": along_ND[:, :seen], "unseen": along_ND[:, seen:]}
    return {
        "kl": float(f"{float(kl_N.mean()):.5g}"),
        **{key: float(f"{float(part.square().sum(1).mean()) / power:.5g}") for key, part in parts.items()},
    }


def judge(result: Result) -> Finding:
    """Holds if length²/KL rises from SmolLM2's first singular direction over an eighth to the last, by a tenth of (σ_1/σ_d)² at least, and the full KL
    leaves over twice OPRD's unseen difference; in part if it rises or leaves over twice.
    """
    moved, left = result["moved"], result["left"]
    growth, theory = moved[-1]["ratio"] / moved[0]["ratio"], (moved[0]["sigma"] / moved[-1]["sigma"]) ** 2
    means = {
        name: {
            key: mean_and_interval([r[key] for r in left if r["objective"] == name])[0] or 0.0
            for key in ("kl", "seen", "unseen", "final")
        }
        for name in ("representation", "full_reverse_kl")
    }
    leaves_more = means["full_reverse_kl"]["unseen"] > 2 * means["representation"]["unseen"]
    rises = all(a["ratio"] < b["ratio"] for a, b in zip((moved[0], moved[3]), (moved[3], moved[-1]), strict=True))
    verdict = (
        "holds" if rises and leaves_more and growth >= 0.1 * theory else "partly" if rises or leaves_more else "not"
    )
    spectra = [
        [name, s["width"], s["seen"], f"{s['condition']:.3g}", f"{s['effective_rank']:.0f}"]
        for name, s in result["spectra"].items()
    ]
    steps = [
        [
            row["place"],
            row["index"],
            f"{row['sigma']:.3f}",
            f"{row['kl']:.3g}",
            f"{row['second_order']:.3g}",
            f"{row['ratio']:.3g}",
        ]
        for row in moved
    ]
    rest = [
        [
            "student before",
            f"{result['before']['kl']:.4f}",
            percent(result["before"]["seen"]),
            percent(result["before"]["unseen"]),
            "",
        ],
        *(
            [
                text,
                f"{means[name]['kl']:.4f}",
                percent(means[name]["seen"]),
                percent(means[name]["unseen"]),
                percent(means[name]["final"]),
            ]
            for name, text in (
                ("full_reverse_kl", "trained on the full reverse KL"),
                ("representation", "trained on states"),
            )
        ),
    ]
    tiny = result["spectra"]["embedded student"]
    ratio = means["full_reverse_kl"]["unseen"] / max(means["representation"]["unseen"], 1e-12)
    by_seed = _by_seed(left)
    text = (
        f"{table(['LM head', 'width', 'directions with an effect', 'σ_1/σ_d', 'effective rank'], spectra)}\n\n{result['states']} states of SmolLM2, "
        f"moved by {percent(STEP, 0)} of their length:\n\n"
        f"{table(['direction', 'number', 'σ/σ_1', 'KL, nats', 'second order', 'length² / KL'], steps)}\n\nAlong the last direction the same squared "
        f"distance causes {growth:.3g} times less KL than along the first; (σ_1/σ_d)² is {theory:.3g}. The theorem weights all logits equally. Real "
        f"distributions are peaked: to second order the KL is the variance of the logits' change under them, which agrees within {percent(_apart(moved), 0)}. "
        f"From each direction to the next the ratio {'rises' if _rising(moved) else 'does not always rise'}. SmolLM2's vocabulary exceeds its width, so there is no "
        f"exact null space; some directions are only cheap.\n\nIn the embedded student {tiny['seen']} of "
        f"{tiny['width']} directions have an effect on the logits; the others have none. Distance of the last states to the teacher's, as a share "
        f"of the teacher's mean square:\n\n"
        f"{table(['', 'KL', 'with an effect', 'without', 'Avg@2'], rest)}\n\nTraining on the full KL leaves {ratio:.3g} times as much difference "
        f"without an effect as training on states (by seed: {listed(by_seed)}). At the last layer this difference is harmless: no distribution changes with it. The two "
        f"objectives also differ for other reasons (E1, E7), so the table does not show what the difference costs."
    )
    number = (
        f"embedded pair: the full reverse KL leaves {ratio:.3g} times (by seed: {listed(by_seed)}) the head-invisible difference that OPRD leaves; SmolLM2's head: "
        f"length²/KL grows {growth:,.0f} times along its spectrum"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _by_seed(left: list[dict[str, Any]]) -> list[str]:
    """How many times as much unseen difference the full KL leaves, for each seed."""
    unseen = {(r["objective"], r["seed"]): r["unseen"] for r in left}
    return [
        f"{value / max(unseen['representation', seed], 1e-12):.3g}"
        for (name, seed), value in sorted(unseen.items())
        if name == "full_reverse_kl"
    ]


def _apart(moved: list[dict[str, Any]]) -> float:
    """The largest relative distance of the second-order KL to the exact one."""
    return max(abs(row["second_order"] / row["kl"] - 1) for row in moved)


def _rising(moved: list[dict[str, Any]]) -> bool:
    return all(one["ratio"] < other["ratio"] for one, other in pairwise(moved))


def draw(result: Result, figure: Any) -> None:
    """Spectra; KL along the directions; the difference after training."""
    figure.set_figheight(5.2)
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    spectra, moving = above.subplots(1, 2)
    for index, (name, s) in enumerate(result["spectra"].items()):
        spectra.plot(
            [i / s["width"] for i in s["index"]], [max(v, 1e-4) for v in s["sigma"]], **look(index) | {"marker": ""}
        )
        # Beside its line: the first one is the upper, the second one falls to the bottom.
        at, text = ((1.0, 0.25), name.removesuffix("-Instruct")) if not index else ((1.0, 1.8e-4), name)
        spectra.annotate(text, at, ha="right", va="bottom", color=colour(index))
    spectra.set(
        yscale="log",
        title="Singular values of the LM head",
        xlabel="direction, % of the width",
        ylabel="σ / σ₁ (cut at 0.0001)",
    )
    in_percent(spectra.xaxis)
    plain_log(spectra.yaxis)
    moved = result["moved"]
    sigma = [r["sigma"] for r in moved]
    moving.plot(sigma, [r["kl"] for r in moved], **look(0))
    moving.plot(sigma, [r["second_order"] for r in moved], "x", color=INK, markersize=7)
    moving.set(
        xscale="log", yscale="log", title="A step of 5 %, SmolLM2", xlabel="σ / σ₁ of its direction", ylabel="KL, nats"
    )
    moving.annotate("line: measured\n×: second order", (0.04, 0.96), xycoords="axes fraction", va="top")
    for axis in (moving.xaxis, moving.yaxis):
        plain_log(axis)
    _draw_left(below.subplots(), result["left"])


def _draw_left(axis: Any, left: list[dict[str, Any]]) -> None:
    """What is left of the difference between last states after training; each mark is a seed."""
    rows = []
    for name, text in (("full_reverse_kl", "full reverse KL"), ("representation", "representation")):
        for index, key in enumerate(("seen", "unseen")):
            own = [r[key] for r in left if r["objective"] == name]
            mean = mean_and_interval(own)[0]
            axis.barh(len(rows), mean, color=colour(index), alpha=0.35, height=0.7)
            axis.plot(own, [len(rows)] * len(own), MARKERS[index], color=colour(index))
            axis.annotate(f"{mean:.4f}", (max(own), len(rows)), xytext=(8, 0), textcoords="offset points", va="center")
            rows.append(f"{text}: {key} by the head")
    name_rows(axis, rows)
    axis.set(
        title="Distance to the teacher's last states after training",
        xlabel="squared distance, relative (marks: seeds)",
        xlim=(0, 1.15 * max(max(r["seen"], r["unseen"]) for r in left)),
    )
