"""`learning_rate: auto` against grids: accuracy at the probed rate, over the best of the grid, and what the probe costs.

    python benchmarks/learning_rate.py [--only NAME …] [--models models] [--json benchmarks/results/learning_rate.json]

The grids of the embedded same-origin pair are the committed tuning runs of E1 and those of SmolLM2 of E11, both on seed 10; probes
use the settings of those runs. The other pairs are run here at every rate: two with bridges, and three of other tasks and
shapes that this script trains (digits are reversed, sorted, rotated). A rate that a grid lacks is run. One process and one
thread; each result is written at once, and a second call does what is missing. Seconds are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from small_pairs import keep_pair

from oprd.data.rows import PromptRow
from oprd.tasks.task import FunctionGrader, Task

ROOT = Path(__file__).parent.parent
RATES = (3e-4, 1e-3, 3e-3)
SHARE = 0.9  # of the best of the grid: what is wanted
SHARED = {
    "max_steps": 60, "per_device_train_batch_size": 16, "reduction": "token", "seed": 10, "eval_num_generations": 2,
    "generation_batch_size": 256, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "log_completions": False,
}  # fmt: skip
OUTPUT_ONLY = {"representation_weight": 0}
DIGITS = 6
_LONGEST = 3000  # steps of training a pair


@dataclass(frozen=True)
class Case:
    """A pair and an objective.

    Args:
        settings: of a run, on top of `SHARED`.
        recipe: that they change.
        committed: file and objective of tuning runs that are committed.
        rates: of the grid that is run here.
        fitted: whether the constants of the probe were chosen with this case; the others are unseen.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "tiny"
    committed: tuple[str, str] | None = None
    rates: tuple[float, ...] = ()
    fitted: bool = False


def _e1(objective: str, **settings: Any) -> Case:
    return Case(settings, committed=("evidence/e01_accuracy/result.json", objective), fitted=True)


def _e11(objective: str, **settings: Any) -> Case:
    own = {"max_steps": 40, "per_device_train_batch_size": 32, "generation_batch_size": 320, **settings}
    return Case(own, "evidence/e11_real_model/recipe.yaml", ("evidence/e11_real_model/result.json", objective))


# As `oprd demo`: what a probe costs beside a whole run. There is no grid.
DEMO = {
    "max_steps": 100,
    "per_device_train_batch_size": 32,
    "reduction": "rollout",
    "eval_num_generations": 4,
    "seed": 0,
}

CASES = {
    "demo": Case(DEMO, fitted=True),
    "representation": _e1("representation"),
    "full_reverse_kl": _e1("full_reverse_kl", **OUTPUT_ONLY, output_space="reverse_kl"),
    "top_4": _e1("top_4", **OUTPUT_ONLY, output_space="top_k", output_top_k=4),
    "supervised": _e1("supervised", **OUTPUT_ONLY, output_space="cross_entropy", lmbda=0.0),
    "states_off_policy": _e1("states_off_policy", lmbda=0.0),
    "wider": Case({"teacher_model": "embedded:wider/teacher"}, rates=RATES, fitted=True),
    "other_tokenizer": Case({"teacher_model": "embedded:other-tokenizer/teacher"}, rates=RATES, fitted=True),
    # The constants were chosen with earlier pairs of the next two names.
    "reversal": Case({"task": "learning_rate:reversal"}, rates=RATES),
    "sorting": Case({"task": "learning_rate:sorting"}, rates=RATES),
    "rotation": Case({"task": "learning_rate:rotation"}, rates=RATES),
    "smollm2_representation": _e11("representation"),
    "smollm2_full_reverse_kl": _e11("full_reverse_kl", **OUTPUT_ONLY, output_space="reverse_kl"),
}


def _numbers(name: str, answer: Callable[[str], str], n: int, seed: int, split: str) -> list[PromptRow]:
    draw = random.Random(f"{name} {seed} {split}")
    found = [str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in range(n)]
    return [PromptRow(f"{number}=", answer(number), source=f"{split} number {i}") for i, number in enumerate(found)]


def _task(name: str, answer: Callable[[str], str]) -> Task:
    grade = FunctionGrader(lambda response, wanted: response.strip() == wanted)
    return Task(name, f"digits: {name}", lambda: grade, problems=partial(_numbers, name, answer))


reversal = _task("reversal", lambda number: number[::-1])  # 123456= → 654321
sorting = _task("sorting", lambda number: "".join(sorted(number)))  # 312312= → 112233
rotation = _task("rotation", lambda number: number[3:] + number[:3])  # 123456= → 456123
MADE = {"reversal": (reversal, {"hidden_size": 96, "num_hidden_layers": 3}, 3),
        "sorting": (sorting, {"hidden_size": 128, "num_hidden_layers": 2}, 4),
        "rotation": (rotation, {"hidden_size": 64, "num_hidden_layers": 4}, 5)}  # fmt: skip
"""Name → task, shape and seed of a pair that is trained here."""


def build_pair(name: str, folder: Path) -> None:
    """Train a small Llama on one of the tasks; see `small_pairs`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from oprd.resolve import load_tokenizer

    task, shape, seed = MADE[name]
    tokenizer = load_tokenizer("embedded:tiny/student")
    torch.manual_seed(seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=256, num_attention_heads=4, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.05, **shape, **ends,
    ))  # fmt: skip
    assert task.problems is not None
    rows = [tokenizer.encode(f"{row.prompt}{row.answer}") for row in task.problems(_LONGEST * 64, 5, "train")]
    ids = torch.tensor([[*row, tokenizer.eos_token_id] for row in rows])
    keep_pair(name, model, tokenizer, ids.split(64), DIGITS, folder)


def prepared(name: str, runs: Path, models: Path) -> dict[str, Any]:
    """Make what a case needs, a bridge or a pair, and return its settings."""
    settings = {**SHARED, **CASES[name].settings}
    if name in MADE:
        folder = runs / name
        if not (folder / "teacher").exists():
            build_pair(name, folder)
        data = {f"{kind}_dataset": f"generated:learning_rate:{name}" for kind in ("train", "eval")}
        settings |= {"model": str(folder / "student"), "teacher_model": str(folder / "teacher"), **data}
        settings |= {"max_completion_length": DIGITS + 2}
    elif name in ("wider", "other_tokenizer"):
        settings["bridge"] = str(runs / f"bridge_{name}")
        if not Path(settings["bridge"]).exists():
            _fit_bridge(settings["teacher_model"], Path(settings["bridge"]))
    elif name.startswith("smollm2"):
        settings |= {
            "model": str(models / "SmolLM2-135M-Instruct"),
            "teacher_model": str(models / "SmolLM2-135M-chain-sum"),
        }
    return settings


def _fit_bridge(teacher: str, folder: Path) -> None:
    from oprd.bridge.collect import fit_bridge
    from oprd.resolve import load_pair
    from oprd.tasks.problems import load_rows

    rows = load_rows("generated:addition", "train", 256, SHARED["seed"])
    pair = load_pair("embedded:tiny/student", teacher)
    fit_bridge(pair, rows, max_completion_length=64, seed=SHARED["seed"], rank=16).save(folder)


def recipe_of(name: str) -> str:
    """The recipe's name or file."""
    recipe = CASES[name].recipe
    return recipe if "/" not in recipe else str(ROOT / recipe)


def probe(name: str, settings: Mapping[str, Any], runs: Path) -> dict[str, Any]:
    """Probe a case; what it found, with CPU seconds."""
    from oprd.resolve import resolve
    from oprd.run_config import RunConfig
    from oprd.training.rate_probe import probe_learning_rate

    own = {"learning_rate": "auto", "output_dir": str(runs / "probe")}
    resolved = resolve(RunConfig.load(recipe_of(name), {**settings, **own}))
    started = time.process_time()
    found = probe_learning_rate(resolved).as_json()
    return {**found, "cpu_seconds": round(time.process_time() - started, 2)}


def train(name: str, settings: Mapping[str, Any], rate: float, folder: Path) -> dict[str, Any]:
    """One run of a case at a rate."""
    import shutil

    from oprd.run_config import RunConfig
    from oprd.runs.loaded import load_run
    from oprd.training.run import train_and_evaluate

    shutil.rmtree(folder, ignore_errors=True)
    run = RunConfig.load(recipe_of(name), {**settings, "learning_rate": rate, "output_dir": str(folder)})
    started = time.process_time()
    summary = train_and_evaluate(run, say=lambda _: None)
    before, after, teacher = (summary[key]["avg_at_k"] for key in ("student_before", "student_after", "teacher"))
    return {
        "final": after, "before": before, "teacher": teacher, "verdict": summary["verdict"],
        "alarms": [row["step"] for row in load_run(folder).metrics if row.get("alarm")],
        "cpu_seconds": round(time.process_time() - started, 2), "train_seconds": summary["train_seconds"],
    }  # fmt: skip


def committed_runs(case: Case) -> dict[str, dict[str, Any]]:
    """Rate → result of the runs that are committed."""
    if case.committed is None:
        return {}
    file, objective = case.committed
    keys = ("final", "before", "teacher", "alarms", "seconds")
    return {
        f"{run['learning_rate']:g}": {key: run[key] for key in keys}
        for run in json.loads((ROOT / file).read_text())["tuning"]
        if run["objective"] == objective
    }


def judged(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """The share of the best of the grid that the probed rate reaches; None while runs are missing."""
    runs, rate = found["runs"], f"{found['probe']['learning_rate']:g}"
    if rate not in runs or any(f"{r:g}" not in runs for r in case.rates):
        return {"share_of_best": None}
    cost = {}
    if "cpu_seconds" in runs[rate]:
        cost = {"run_over_probe": round(runs[rate]["cpu_seconds"] / found["probe"]["cpu_seconds"], 1)}
    if not case.committed and not case.rates:
        return cost
    best = max(runs, key=lambda r: runs[r]["final"])
    return {
        "best_rate": float(best), "best": runs[best]["final"], "at_probed": runs[rate]["final"],
        "share_of_best": round(runs[rate]["final"] / runs[best]["final"], 4),
        "holds": runs[rate]["final"] >= SHARE * runs[best]["final"], **cost,
    }  # fmt: skip


def main() -> None:
    """Do what is missing, and print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*CASES], choices=[*CASES])
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where SmolLM2 and its teacher are")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning_rate")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "learning_rate.json")
    parser.add_argument("--probes-only", action="store_true", help="run no grid")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    args.runs.mkdir(parents=True, exist_ok=True)

    def keep(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        change(results.setdefault(name, {"fitted": CASES[name].fitted, "runs": committed_runs(CASES[name])}))
        if "probe" in results[name]:
            results[name] |= judged(CASES[name], results[name])
        args.json.write_text(json.dumps(results, indent=1) + "\n")

    for name in args.only:
        settings = prepared(name, args.runs, args.models)
        if "probe" not in results.get(name, {}):
            found = probe(name, settings, args.runs)
            keep(name, lambda result, found=found: result.update(probe=found))
        print(f"{name}: {results[name]['probe']}", flush=True)
        wanted = {f"{rate:g}" for rate in (results[name]["probe"]["learning_rate"], *CASES[name].rates)}
        for rate in sorted(wanted - {*results[name]["runs"]}, key=float, reverse=True):
            if args.probes_only:
                continue
            one = train(name, settings, float(rate), args.runs / f"{name}_{rate}")
            keep(name, lambda result, rate=rate, one=one: result["runs"].update({rate: one}))
            print(f"{name} at {rate}: {one}", flush=True)
        print(
            f"{name}: { ({key: results[name].get(key) for key in ('best_rate', 'share_of_best', 'holds', 'run_over_probe')}) }",
            flush=True,
        )


if __name__ == "__main__":
    main()
