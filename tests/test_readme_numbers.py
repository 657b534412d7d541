"""Every number in README.md is in a table here, with the committed file that it comes from."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from oprd.tools.compare.interval import mean_and_interval, t_quantile

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
E1, E3, E5, E10, E11, E13, E24 = (
    f"evidence/{name}/result.json"
    for name in (
        "e01_accuracy",
        "e03_positions",
        "e05_cost",
        "e10_bridge",
        "e11_real_model",
        "e13_trl",
        "e24_trl_real_model",
    )
)
DEMO = "evidence/first_light/demo_summary.json"
NUMBER = re.compile(r"(?<![\w@.-])[+−]?\d(?:[\d.,]*\d)?")  # not the number of a name: top-16, H200, Avg@2


@cache
def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text())


def finals(file: str, objective: str, key: str = "final", runs: str = "runs") -> dict[int, float]:
    """Seed → a value of an objective's runs in a claim's result."""
    return {r["seed"]: r[key] for r in read(file)[runs] if r["objective"] == objective}


def percent(value: float | None, digits: int = 1) -> str:
    assert value is not None
    return f"{100 * value:.{digits}f}".replace("-", "−")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def after(file: str, *objectives: str) -> list[str]:
    return [percent(mean(list(finals(file, name).values()))) for name in objectives]


def with_ends(file: str, objective: str) -> list[str]:
    average, ends = mean_and_interval(list(finals(file, objective).values()))
    assert ends is not None
    return [percent(average), *map(percent, ends)]


def lead(file: str, one: str, other: str) -> list[str]:
    """Mean of the differences seed by seed and half of its interval, in points, with a sign."""
    mine, theirs = finals(file, one), finals(file, other)
    average, ends = mean_and_interval([mine[seed] - theirs[seed] for seed in mine])
    assert average is not None
    assert ends is not None
    return [f"{100 * average:+.1f}".replace("-", "−"), f"{50 * (ends[1] - ends[0]):.1f}"]


def closed(file: str, objective: str, runs: str = "runs") -> str:
    before, teacher, final = (finals(file, objective, key, runs) for key in ("before", "teacher", "final"))
    return percent(mean([(final[s] - before[s]) / (teacher[s] - before[s]) for s in final]), 0)


def real_model() -> list[str]:
    """Steps, rollouts, the best final accuracy of hidden states over their rates, and the teacher's."""
    found = read("evidence/real_model_gpu/curves.json")
    ours = max(r["final"] for r in found["runs"] if r["objective"] == "representation")
    (steps,) = {r["points"][-1][0] for r in found["runs"]}
    return [str(steps), str(found["rollouts"]), percent(ours), percent(found["teacher"])]


def pretrained() -> list[str]:
    """Teacher, steps, rollouts, seeds and the mean accuracy of seven objectives of E11."""
    runs = [r for r in read(E11)["runs"] if r["objective"] == "representation"]
    names = (
        "representation",
        "states_off_policy",
        "supervised",
        "forward_kl",
        "full_reverse_kl",
        "top_16",
        "sampled_token",
    )
    recipe = yaml.safe_load((ROOT / "evidence/e11_real_model/recipe.yaml").read_text())
    teacher, rollouts = percent(mean([r["teacher"] for r in runs])), recipe["per_device_train_batch_size"]
    start = percent(mean([r["before"] for r in runs]))
    return [teacher, str(runs[0]["steps"]), str(rollouts), str(len(runs)), *after(E11, *names), start]


def demo() -> list[str]:
    run = read(DEMO)
    low, high = run["student_after"]["ci95"]
    before, end, teacher = (run[name]["avg_at_k"] for name in ("student_before", "student_after", "teacher"))
    return [
        percent(before, 0), percent(end, 0), confidence(), percent(low, 0), percent(high, 0), percent(teacher), str(run["steps"]),
        f"{run['seconds']:.0f}",
    ]  # fmt: skip


def confidence() -> str:
    return f"{100 * signature(t_quantile).parameters['confidence'].default:.0f}"


def verdicts() -> list[str]:
    from evidence.__main__ import HERE, claims, results

    known = results(HERE)
    found = [claim.judge(known[claim.ID]).verdict for _, claim in claims() if claim.ID in known]
    return [str(len([*claims()])), str(len(found)), *(str(found.count(name)) for name in ("holds", "partly", "not"))]


def saved() -> list[str]:
    rows = {row["name"]: row for row in read(E5)["gpu"]["rows"] if row["checkpointing"]}

    def less(name: str, key: str) -> str:
        return f"{100 * (1 - rows['representation'][key] / rows[name][key]):.0f}"

    dense = [less("dense_top16", key) for key in ("bytes_with_weights", "peak_bytes")]
    return [less("top16", "bytes_with_weights"), less("top16", "seconds"), *dense]


def papers_saving() -> str:
    """From the claim's own text: 20.5 GB against top-16's 45.0."""
    from evidence.e05_cost.claim import CLAIM

    ours, top_16 = (float(re.search(pattern, CLAIM)[1]) for pattern in (r"takes ([\d.]+) GB", r"top-16 ([\d.]+)"))  # type: ignore[index]
    return f"{100 * (1 - ours / top_16):.0f}"


def python() -> list[str]:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    return [wanted.removeprefix(">=")]


def in_file(file: str, text: str, *numbers: str) -> list[str]:
    """Numbers of a text that must stand in a file."""
    assert text.format(*numbers) in (ROOT / file).read_text()
    return list(numbers)


# Text of README.md, without code and addresses → its numbers, from their sources. `{}` is a number.
SOURCES: dict[str, Callable[[], list[str]]] = {
    "trained on worked solutions ({} %): {} steps of {} rollouts, tuned rates, means of {} seeds. "
    "Hidden states {} % (on the teacher's responses {} %), supervised {} %, forward KL {} %, full reverse KL {} %, top-16 {} %, "
    "sampled-token {} %, "
    "start {} %":
        pretrained,
    "One seed on a GPU, {} steps of {}: {} %, teacher {} %": real_model,
    "`…`: {} % → {} % ({} % interval over problems {}–{} %; teacher {} %), {} steps, {} s on one CPU core.": demo,
    "Python {} or newer": python,
    "the default is Eq. {} on all layers": partial(in_file, "docs/objectives.md", "**representation** (Eq. {})", "6"),
    "Of {} claims, {} are measured: {} hold, {} hold in part, {} do not": verdicts,
    "{} % of the gap closed": lambda: [closed(E1, "representation")],
    "{} ± {} points over the full reverse KL, {} ± {} points over hidden states on the teacher's responses": lambda: [
        *lead(E1, "representation", "full_reverse_kl"), *lead(E1, "representation", "states_off_policy"),
    ],
    "{} % less GPU memory and {} % less time than chunked top-16; {} % less memory than dense ({} % less without weights; "
    "paper: {})": lambda: [
        *saved(), papers_saving(),
    ],
    "{} % [{}, {}], at another rate {} % [{}, {}]; all positions {} % [{}, {}]": lambda: [
        *with_ends(E3, "states_last"), *with_ends(E3, "states_last_slowly"), *with_ends(E3, "representation"),
    ],
    "{} % of the gap to a wider teacher (full reverse KL alone {} %), {} % across tokenizers ({} %)": lambda: [
        closed(E10, name, runs) for runs in ("wider", "other_tokenizer") for name in ("rank_16", "output_alone")
    ],
    "{} ± {} points over the best output-space loss (forward KL), {} ± {} points over supervised training; "
    "tail-sampled top-16 ends between {} and {} %": lambda: [
        *lead(E11, "representation", "forward_kl"), *lead(E11, "representation", "supervised"),
        *(f"{100 * end(finals(E11, 'tail_sampled_16').values()):.0f}" for end in (min, max)),
    ],
    "Beside TRL** (holds): {} ± {} points over its tuned `…`": partial(lead, E13, "representation", "distillation"),
    "pretrained** (holds in part): {} ± {} points over its tuned `…`; with oprd's warm-up {} ± {} points": lambda: [
        *lead(E24, "representation", "distillation"), *lead(E24, "representation", "distillation_as_ours"),
    ],
}  # fmt: skip


def prose(text: str) -> str:
    """Markdown without blocks of code, comments and addresses, in one line; inline code becomes `…`."""
    for pattern, put in ((r"^```.*?^```", ""), (r"<!--.*?-->", ""), (r"\]\([^)\s]+\)", "]"), (r"`[^`\n]*`", "`…`")):
        text = re.sub(pattern, put, text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def problems(text: str, sources: dict[str, Callable[[], list[str]]]) -> list[str]:
    """What is wrong with the numbers of a text: one that its source gives otherwise, one without a source."""
    wrong, known = [], set()
    for template, source in sources.items():
        numbers = source()
        said = template.format(*numbers)
        if (start := text.find(said)) < 0:
            wrong.append(f"not in the text: {said!r}")
            continue
        for part, number in zip(template.split("{}")[:-1], numbers, strict=True):
            start += len(part)
            known |= set(range(start, start + len(number)))
            start += len(number)
    for found in NUMBER.finditer(text):
        if not set(range(*found.span())) <= known:
            wrong.append(f"no source for {found[0]!r} in {text[max(found.start() - 40, 0) : found.end() + 30]!r}")
    return wrong


def test_every_number_in_the_readme_has_its_source():
    assert not problems(prose(README.read_text()), SOURCES)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("seconds", "12 seconds", "no source for '12'"),
        ("+1.5", "+1.6", "not in the text"),
        ("5-digit", "6-digit", "not in the text"),
    ],
)
def test_a_number_without_a_source_or_with_another_value_is_found(old, new, complaint):
    text = "5-digit sums, +1.5 points in a few seconds; top-16 and Avg@2 on an H200 are names."
    sources = {"{}-digit sums": lambda: ["5"], "{} points": lambda: ["+1.5"]}
    assert problems(text, sources) == []
    assert complaint in problems(text.replace(old, new, 1), sources)[0]


def test_code_and_addresses_are_no_prose():
    text = "a `1.0` b\n```\n2\n```\n[c 3](https://x/4)\n<!-- 5 -->\nd"
    assert prose(text) == "a `…` b [c 3] d"


ROWS = {
    "representation": "representation",
    "sampled-token + 10 × representation": "composite_mu_10",
    "full reverse KL": "full_reverse_kl",
    "tail-sampled top-4 (TT-OPD)": "tail_sampled_top_4",
    "top-4, renormalised": "top_4",
    "sampled-token + 1 × representation": "composite_mu_1",
    "sampled-token": "sampled_token",
    "GRPO": "grpo",
    "µ = 10 with L_OPD summed over tokens": "composite_sum_mu_10",
}


def objectives_row(name: str, label: str, seconds: str) -> str:
    """The row of docs/objectives.md for an objective, from the committed comparison."""
    rows = {r["learning_rate"]: r for r in read("evidence/objectives/compare.json")["rows"] if r["objective"] == name}

    def cell(rate: float) -> str:
        low, high = rows[rate]["final_ci95"]
        return f"{100 * rows[rate]['final_avg']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    best = max(sorted(rows), key=lambda rate: rows[rate]["final_avg"])
    shown = f"{best:.0e}".replace("e-0", "e-")
    cells = [cell(rate) if rate in rows else "" for rate in (3e-4, 1e-3)]
    return f"| {label} | {' | '.join(cells)} | {cell(best)} at {shown} | {seconds} |"


@pytest.mark.parametrize("label", ROWS)
def test_the_table_of_objectives_is_the_committed_comparison(label):
    lines = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {label} |") and " at " in line]
    seconds = line.split("|")[-2].strip()
    assert line.replace("|  |", "| |") == objectives_row(ROWS[label], label, seconds).replace("|  |", "| |")


def test_only_two_objectives_are_best_inside_the_rates_that_docs_objectives_shows():
    rows = read("evidence/objectives/compare.json")["rows"]
    inside = set()
    for name in {r["objective"] for r in rows}:
        tried = {r["learning_rate"]: r["final_avg"] for r in rows if r["objective"] == name}
        best = max(sorted(tried), key=tried.__getitem__)
        inside |= {name} if min(tried) < best < max(tried) else set()
    assert inside == {"grpo", "full_reverse_kl"}
    assert "only GRPO's and the full reverse KL's lie inside the rates tried" in prose(
        (ROOT / "docs" / "objectives.md").read_text()
    )


def gibibytes() -> list[str]:
    rows = {row["name"]: row for row in read(E5)["gpu"]["rows"] if row["checkpointing"]}
    ways = ("representation", "top16", "trl_distillation", "reference_way")
    return [f"{rows[name]['bytes_with_weights'] / 2**30:.1f}" for name in ways]


ALTERNATIVES: dict[str, Callable[[], list[str]]] = {
    "Others' documents were read on {}-11-28": lambda: ["2026"],
    "**{} GiB**; its chunked top-16 {} ([E5]) | measured by the same script: TRL's loss {}, the published code's way {}": gibibytes,
    "**`…`, {} s on one core": lambda: demo()[-1:],
    "none: {}M parameters at most": partial(in_file, "evidence/e11_real_model/claim.py", "SmolLM2-{}M", "135"),
    "{}B on AIME": partial(in_file, "evidence/e11_real_model/claim.py", "R1-Distill-Qwen-{}B", "1.5"),
}


def test_the_alternatives_are_ten_facts_with_their_sources():
    text = (ROOT / "docs" / "alternatives.md").read_text()
    assert not problems(prose(text), ALTERNATIVES)
    _, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 10
    for row in rows:
        assert "](" in row, row
    ahead = [row.split("|")[3] for row in rows if "**" in row.split("|")[3]]
    assert len(ahead) >= 3, "where others are ahead, the table says so"


def test_the_start_page_says_what_the_first_hour_measured():
    runs = read("benchmarks/results/first_hour.json")
    said = [f"from {100 * r['before']:.1f} to {100 * r['after']:.1f} %" for r in runs.values()]
    (reversal, sorting), teachers = said, [f"{100 * r['teacher']:.1f}" for r in runs.values()]
    text = prose((ROOT / "docs" / "start.md").read_text())
    assert (
        f"{reversal} (teacher {teachers[0]}) and {sorting} ({teachers[1]}) in {runs['sorting']['steps']} steps" in text
    )
    assert all(run["holds"] and run["gap_closed"] >= 0.85 for run in runs.values())


def test_the_recipe_of_pruned_students_says_what_was_measured():
    runs, text = read("evidence/e15_recovery/result.json")["runs"], prose((ROOT / "docs" / "recipes.md").read_text())

    def at(keep: str, name: str, key: str = "final") -> str:
        return percent(mean([r[key] for r in runs[keep] if r["objective"] == name]))

    ours, full, given = "representation", "full_reverse_kl", "supervised"
    four = (
        f"{at('4', ours, 'before')} → {at('4', ours)} % with hidden states, {at('4', full)} with the full reverse KL, "
    )
    four += f"{at('4', given)} with supervised"
    assert four in text
    assert (
        f"Cut to 3 blocks, {at('3', ours, 'before')} → {at('3', ours)}, {at('3', full)} and {at('3', given)} %" in text
    )


def test_the_recipe_of_pruned_students_says_what_was_measured_on_a_pretrained_model():
    runs, text = (
        read("evidence/e25_recovery_real_model/result.json")["runs"], prose((ROOT / "docs" / "recipes.md").read_text())
    )  # fmt: skip

    def at(keep: str, name: str, key: str = "final") -> str:
        return percent(mean([r[key] for r in runs[keep] if r["objective"] == name]))

    others = max((at("20", name) for name in ("full_reverse_kl", "sampled_token", "supervised")), key=float)
    assert f"{at('20', 'representation', 'before')} → {at('20', 'representation')} % with hidden states" in text
    assert f"at most {others} otherwise, though supervised has the lower perplexity." in text
    assert f"To 24 blocks: {at('24', 'representation')}, supervised" in text
    assert f"supervised {at('24', 'supervised')}." in text
    steps = {r["steps"] for own in runs.values() for r in own}
    assert f"to 20 blocks, {steps.pop()} steps" in text
    assert not steps


def test_the_full_kl_across_tokenizers_is_said_at_its_own_rate():
    runs = read(E10)["other_tokenizer"]
    bridge, alone = (mean([r["final"] for r in runs if r["objective"] == name]) for name in ("rank_16", "output_alone"))
    text = prose((ROOT / "docs" / "bridge.md").read_text())
    assert {r["learning_rate"] for r in runs if r["objective"] == "output_alone"} == {1e-5}
    assert (
        f"after 60 steps it has {percent(alone)} %, not significantly less than the bridge's {percent(bridge)}" in text
    )


def test_the_pretrained_pair_of_docs_objectives_is_what_was_measured():
    found, text = read("evidence/real_model_gpu/curves.json"), prose((ROOT / "docs" / "objectives.md").read_text())
    ours, full = (
        max(r["final"] for r in found["runs"] if r["objective"] == name)
        for name in ("representation", "full_reverse_kl")
    )
    steps, (ahead, half) = read(E11)["runs"][0]["steps"], lead(E11, "representation", "full_reverse_kl")
    forward, half_forward = lead(E11, "representation", "forward_kl")
    assert (
        f"it leads the forward KL by {forward.removeprefix('+')} ± {half_forward} points and the full reverse KL by "
        f"{ahead.removeprefix('+')} ± {half} points after {steps} steps" in text
    )
    assert f"and by {100 * (ours - full):.0f} after {found['runs'][0]['points'][-1][0]}, with one seed" in text


def test_the_presets_of_docs_objectives_are_what_was_measured():
    names = ("oprd", "ride", "latent_mopd", "lastopd", "phf", "adaptive")
    ours, ride, latent, last, phf, adaptive = after("evidence/e20_presets/result.json", *names)
    text = prose((ROOT / "docs" / "objectives.md").read_text())
    assert f"`…` {ours} %, `…` {ride}, `…` {latent}, `…` {last}, `…` {phf}." in text
    assert f"it ends at {adaptive} %, states alone at {ours}" in text


def test_the_far_pairs_of_docs_choose_are_what_was_measured():
    far = "evidence/e23_far_pair/result.json"
    names = ("mixed", "supervised", "states", "output_space", "supervised_then_states")
    mixed, supervised, states, full, then = after(far, *names)
    text, rates = prose((ROOT / "docs" / "choose.md").read_text()), read(far)["rates"]
    lower = f"{rates['states'] / rates['output_space']:.0f}"
    assert f"this reaches {mixed} %. Supervised training alone" in text
    for other in ("supervised", "states"):  # the two that come nearest
        number, half = lead(far, "mixed", other)
        assert 0 < float(number) < float(half)
    assert (
        f"reaches {supervised}, no significant difference; states alone {states}; the full reverse KL alone, at a rate {lower} "
        f"times lower, {full}; 20" in text
    )
    assert f"20 supervised steps and then states {then}." in text


def test_the_rates_that_docs_choose_names_are_those_of_the_first_claim():
    tried: dict[str, dict[float, float]] = {}
    for run in read(E1)["tuning"]:
        tried.setdefault(run["objective"], {})[run["learning_rate"]] = run["final"]
    best = {name: max(sorted(own), key=own.__getitem__) for name, own in tried.items()}
    text = (ROOT / "docs" / "choose.md").read_text()
    for label, name in {
        "representation": "representation",
        "full reverse KL": "full_reverse_kl",
        "top-4, renormalised": "top_4",
        "supervised, on the teacher's responses": "supervised",
    }.items():
        assert f"| {label} | {best[name]:.0e} |".replace("e-0", "e-") in text
    for name in ("sampled_token", "grpo"):
        assert best[name] == min(tried[name]) == 3e-5
    assert max(tried["representation"][3e-3], tried["full_reverse_kl"][1e-3]) < 0.05


OURS, FULL, TEN = "representation", "full_reverse_kl", "composite_mu_10"
COMPARED = [
    ((OURS, 3e-4), (FULL, 3e-4)),
    ((OURS, 1e-3), (FULL, 1e-3)),
    ((OURS, 2e-3), (FULL, 1e-3)),
    ((TEN, 1e-3), (OURS, 1e-3)),
    ((TEN, 2e-3), (OURS, 2e-3)),
]
"""Objectives at rates, whose differences docs/objectives.md has from the committed comparison."""


def lead_at(one: tuple[str, float], other: tuple[str, float]) -> str:
    """Lead in the committed comparison of one objective at a rate over another, seed by seed: "+2.6 ± 1.8"."""
    rows = {
        (r["objective"], r["learning_rate"]): r["final_by_seed"]
        for r in read("evidence/objectives/compare.json")["rows"]
    }
    average, ends = mean_and_interval([rows[one][seed] - rows[other][seed] for seed in rows[one]])
    assert average is not None
    assert ends is not None
    return f"{100 * average:+.1f} ± {50 * (ends[1] - ends[0]):.1f}".replace("-", "−")


def test_the_differences_of_objectives_are_those_of_the_committed_comparison():
    text = prose((ROOT / "docs" / "objectives.md").read_text())
    leads = [lead_at(*two) for two in COMPARED]
    assert f"full reverse KL: {leads[0]} at 3e-4, {leads[1]} at 1e-3, {leads[2]} at each one's best rate" in text
    assert f"not significantly different here ({leads[3]} at 1e-3, {leads[4]} at 2e-3)" in text
    number, half = lead("evidence/e02_composite/result.json", "composite_mu_100", "representation")
    assert f"the best of three µ, 100, ahead by {number.removeprefix('+')} ± {half} ([E2])" in text
    report = read("evidence/objectives/compare.json")
    before, teacher = (percent(report[key]["avg"]) for key in ("student_before", "teacher"))
    assert f"Student before {before}, teacher {teacher}" in text


DIFFERENCE = re.compile(r"([+−]?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")


WRITTEN_BY_PROGRAMS = ("benchmarks.md", "evidence.md")
BY_HAND = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in WRITTEN_BY_PROGRAMS]


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.stem)
def test_each_difference_with_an_interval_is_in_a_claim_that_its_page_links(page):
    """Rounded as the page has it, and without its sign: "38 ± 8 behind" is "−38.2 ± 7.9 points"."""
    text = page.read_text()
    linked = {page.parent / name for name in re.findall(r"\]\((\.\./evidence/\w+/README\.md)", text)}
    pairs = [DIFFERENCE.findall(claim.read_text()) for claim in linked]
    known = [[float(part.replace("−", "-")) for part in pair] for own in pairs for pair in own]
    for pair in {*DIFFERENCE.findall(text)} - {tuple(lead_at(*two).split(" ± ")) for two in COMPARED}:
        digits, value = len(pair[1].partition(".")[2]), [abs(float(part.replace("−", "-"))) for part in pair]
        assert value in [[round(abs(part), digits) for part in own] for own in known], " ± ".join(pair)
