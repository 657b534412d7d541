"""Rules that turn the figures of a report into settings. Each rule names its figures.

All functions here depend on the report alone (`oprd.tools.diagnose.measure`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oprd.bridge.command import fit_command
from oprd.bridge.curve import DIRECT_R2, SAME_CKA, USABLE_CKA
from oprd.config import AUTO
from oprd.data.yaml_text import dump_yaml
from oprd.sanitize import printable
from oprd.states.layer_maps import KEPT
from oprd.tasks.measures import ACCURACY, REWARD, in_words
from oprd.tools.diagnose.verdict import PRUNED, spread

Report = Mapping[str, Any]

# LastOPD (arXiv 2609.28845) and RIDE (2609.36484) compare all layers at about this CKA between equal layers. The embedded pair
# works on all layers at 0.9, so the threshold is shown, not enforced.
GATE_CKA = 0.98
# Where the student ends a text, a teacher that agrees gives its end ids at least this share of the student's end probability.
# A share and not an absolute value, since both models often find a sampled end improbable.
END_SHARE = 0.5
PAPER_LAST_K = 2000
# The student answers in another style than the teacher where one of these figures says so.
STYLE_KL = 1.0  # nats a position, reverse KL
STYLE_FINISHED = 0.8  # share of answers that the student ends, over the teacher's (over 1 where it is not known)
STYLE_LENGTH = 2.0  # mean length of one model's answers over the other's
# Settings of the report that a recipe takes over, with their defaults.
_RENDERING = {
    "chat_template_kwargs": None, "chat_template_date": None, "teacher_chat_template_kwargs": None, "teacher_system_prompt": None,
    "special_token_map": None, "split_special_tokens": True,
}  # fmt: skip
_READING = {"prompt_column": None, "dataset_config": None, "merge_system_prompt": False}


def advise(report: Report) -> dict[str, Any]:
    """Apply all rules to a report, and collect their settings as a recipe.

    Returns:
        `advice`: list of `{"about", "choose", "because", "settings"}`. `recipe`: YAML. `bridge_command`: None if none is needed.
    """
    rules = [*_rules(report), *filter(None, (_rate(report), _gap(report)))]
    settings = {
        "model": report["student"],
        "teacher_model": report["teacher"],
        **_changed(report, _READING | _RENDERING),
    }
    for rule in rules:
        settings |= rule["settings"]
    verdict = report["verdict"]
    command = bridge_command(report) if verdict["bridge"] and verdict["kind"] != "unrelated" else None
    return {"advice": rules, "recipe": dump_yaml(settings), "bridge_command": command}


def advised_settings(report: Report) -> dict[str, Any]:
    """The settings that all rules but the learning rate's set together, without the models."""
    settings = _changed(report, _RENDERING)
    for rule in _rules(report):
        settings |= rule["settings"]
    return settings


def _rules(report: Report) -> list[dict[str, Any]]:
    makers = (_bridge, _layers, _positions, _output, _start, _ends)
    return [rule for make in makers for rule in [make(report)] if rule is not None]


def _rule(about: str, choose: str, because: str, **settings: Any) -> dict[str, Any]:
    return {"about": about, "choose": choose, "because": because, "settings": settings}


def _bridge(report: Report) -> dict[str, Any]:
    verdict = report["verdict"]
    if not verdict["bridge"]:
        return _rule(
            "bridge", "none: states are compared dimension by dimension", f"{verdict['kind']}: {verdict['reason']}"
        )
    if verdict["kind"] == "unrelated":
        return _rule(
            "bridge", "none; match output distributions alone, or choose another teacher",
            f"CKA of the last layers {report['cka']['matrix'][-1][-1]:.3f} is below {USABLE_CKA}: the student's states predict "
            "little of the teacher's (Theorem 3); `oprd bridge fit` measures how much, on held-out rollouts",
            representation_weight=0,
        )  # fmt: skip
    return _rule(
        "bridge", "fit one; its verdict and rank curve (Theorem 3) show which layers and which rank to use",
        f"{verdict['kind']}: {verdict['reason']}", bridge="bridges/mine",
    )  # fmt: skip


def _layers(report: Report) -> dict[str, Any] | None:
    verdict = report["verdict"]
    if verdict["kind"] == "unrelated":
        return None
    if verdict["bridge"]:
        return _rule(
            "layers", "all that `oprd bridge fit` calls usable, including the last",
            f"CKA along the best layer map {spread(report['cka']['best'])}", layers="all",
        )  # fmt: skip
    if verdict["kind"] == PRUNED:
        kept, layers = report["kept_layers"], report["models"]["teacher"]["layers"]
        return _rule(
            "layers", f"all, each with the teacher's layer that it was ({KEPT})",
            f"the student is the teacher without {layers - len(kept)} of its {layers} layers: it kept "
            f"{', '.join(map(str, kept))}", layers="all", layer_map=KEPT,
        )  # fmt: skip
    upper, layers = verdict["layers"], report["layers"]
    columns = zip(layers["layer"], layers["cka"], layers["cka_directions"], strict=True)
    only = [layer for layer, raw, unit in columns if layer in upper and raw < SAME_CKA <= unit]
    gate = "reach" if min(layers["cka_directions"]) >= GATE_CKA else "do not reach"
    because = (
        f"states scaled to unit length have CKA {spread(layers['cka_directions'])}, "
        f"direct R² {spread(layers['direct_r2_directions'])}; they {gate} the CKA of {GATE_CKA} of published pairs"
    )
    if only:
        raw = [layers["cka"][layer - 1] for layer in only]
        because += (
            f". Raw, CKA is {spread(raw)} in layers {', '.join(map(str, only))}: there, a few positions with large states "
            "dominate, in the loss too; normalize: true gives all positions equal weight"
        )
    if verdict["kind"] == "same origin":
        return _rule("layers", "all", f"every layer agrees: {because}", layers="all")
    return _rule(
        "layers", f"{upper[0]} to {upper[-1]}",
        f"below layer {upper[0]} direct R² is under {DIRECT_R2}; {because}", layers=upper,
    )  # fmt: skip


def _positions(report: Report) -> dict[str, Any]:
    longest = report["rollouts"]["longest"]
    curve = report["positions"]["cosine"] if not report["verdict"]["bridge"] else None
    name = "cosine" if curve else "reverse KL"
    curve = curve or report["positions"]["reverse_kl"]
    where = f"the longest rollout has {longest} tokens (limit {report['rollouts']['limit']})"
    if curve:
        k = next((k for k in curve["k"] if k * 10 >= longest), curve["k"][-1])
        at = curve["k"].index(k)
        end = "" if curve["at_end"] is None else f", at the end token {curve['at_end']:.3g}"
        first, last = curve["first_k"][at], curve["last_k"][at]
        where += f"; {name} over the first {k} positions {first:.3g}, over the last {k} {last:.3g}{end}"
    if longest > PAPER_LAST_K:
        return _rule(
            "positions", f"the last {PAPER_LAST_K}, as in the paper", where, positions="last_k", position_k=PAPER_LAST_K
        )
    return _rule("positions", f"all (the paper's last {PAPER_LAST_K} cover every rollout)", where, positions="all")


def _output(report: Report) -> dict[str, Any]:
    output, tokens, kind = report["output"], report["tokens"], report["verdict"]["kind"]
    kl = "no position could be compared" if output["reverse_kl"] is None else (
        f"reverse KL {output['reverse_kl']:.3g} nats per position, overlap of the most probable tokens {output['overlap']:.1%}"
    )  # fmt: skip
    if not tokens["same_ids"]:
        return _rule(
            "output space", "no output-space loss; if you add one, watch accuracy from the first steps",
            f"{tokens['one_to_one']:.1%} of the student's positions have the same next token in both tokenizers; with 77 % on the "
            f"embedded pair every such term collapsed at learning rates of 0.0003 and 0.001 (docs/bridge.md). {kl}",
        )  # fmt: skip
    if kind == "unrelated":
        return _rule("output space", "exact reverse KL alone", kl, output_space="reverse_kl", reduction="token")
    if report["verdict"]["bridge"]:
        return _rule(
            "output space", "exact reverse KL in addition to the bridge, whose loss does not include the LM head",
            f"{kl}; on the embedded pair of two shapes it added five to seven points (docs/bridge.md)",
            output_space="reverse_kl", reduction="token",
        )  # fmt: skip
    return _rule(
        "output space", "none to begin with: with states of one origin, the distributions follow",
        f"{kl}; {_unseen(report)}on the embedded pair hidden states alone are ahead of every output-space loss "
        "(evidence/objectives)",
    )  # fmt: skip


def _start(report: Report) -> dict[str, Any] | None:
    """Whether the teacher writes responses too: its states say little about answers in another style.

    In half of the steps, since on the embedded far pair this is ahead of 20 such steps and then none (evidence/e23_far_pair).
    """
    found = _style(report)
    if report["verdict"]["kind"] == "unrelated" and not report["tokens"]["same_ids"]:
        return _rule(
            "responses", "train on the teacher's responses alone",
            "; ".join([*found, "neither states nor distributions of the two can be compared"]),
            lmbda=0.0, output_space="cross_entropy",
        )  # fmt: skip
    if not report["verdict"]["bridge"] or not found:
        return None
    settings: dict[str, Any] = {"lmbda": 0.5}
    if not report["tokens"]["same_ids"]:  # no other loss reads every token of the student
        settings |= {"output_space": "cross_entropy", "reduction": "token"}
    return _rule(
        "responses", "let the teacher write them in half of the steps",
        f"{'; '.join(found)}: another style, about which the teacher's states say little", **settings,
    )  # fmt: skip


def _style(report: Report) -> list[str]:
    """What shows that the student answers in another style than the teacher."""
    output, accuracy, own = report["output"], report["accuracy"], report["rollouts"]["finished"]
    theirs = 1.0 if accuracy is None else accuracy["teacher"]["finished"]
    found = []
    if own < STYLE_FINISHED * theirs:
        beside = "" if accuracy is None else f", the teacher {theirs:.0%}"
        found.append(f"the student finishes {own:.0%} of its answers{beside}")
    kl = output["reverse_kl"]
    if kl is not None and kl >= STYLE_KL:
        nats = output["entropy_student"]
        found.append(
            f"the student's tokens have a cross-entropy of {nats + kl:.2g} nats under the teacher, of {nats:.2g} "
            "under the student"
        )
    if accuracy is not None:
        lengths = [accuracy[side]["mean_length"] for side in ("student", "teacher")]
        if max(lengths) > STYLE_LENGTH * min(lengths):
            found.append(f"its answers have {lengths[0]:.0f} tokens on average, the teacher's {lengths[1]:.0f}")
    return found


def _unseen(report: Report) -> str:
    """The share of the last states' difference that hardly moves the distributions (Theorem 2); "" if states need a bridge."""
    theory = report["theory"]
    if theory["difference_in_least_half"] is None:
        return ""
    if theory["rank"] < theory["width"]:
        return (
            f"{theory['difference_unseen']:.0%} of the last states' difference changes no distribution (the LM head reads "
            f"{theory['rank']} of {theory['width']} directions; Theorem 2); "
        )
    return (
        f"{theory['difference_in_least_half']:.0%} of the last states' difference lies in the half of the directions that the LM "
        f"head weighs least, with {theory['half_seen']:.1%} of the sum of its squared singular values (Theorem 2); "
    )


def _ends(report: Report) -> dict[str, Any] | None:
    ends = report["ends"]
    if not ends["positions"]:
        return _rule(
            "end of turn",
            "longer rollouts: --max-completion-length",
            "no rollout ended by itself, so end tokens cannot be compared",
        )
    mass, students = ends["teacher"]["mass"], ends["student"]["mass"]
    tokens = ", ".join(map(printable, ends["teacher"]["stop_tokens"]))
    seen = (
        f"where the student ends a text ({ends['positions']} of {report['rollouts']['count']} rollouts) it gives its end ids "
        f"a probability of {students:.1%}, the teacher gives its own ({tokens}) {mass:.1%}"
    )
    if ends_differ(report):
        return _rule(
            "end of turn", "merge the ids that end a text (`end_of_turn: merge`, the default), never by_id",
            f"{seen} and the student's {ends['teacher']['mass_on_students_ids']:.1%}", end_of_turn="merge",
        )  # fmt: skip
    if mass < END_SHARE * students:
        return _rule(
            "end of turn", "find out why before training: the chat template, or an end token missing from the teacher's config",
            f"{seen}; its most probable token there is '{printable(ends['teacher']['likeliest_token'])}'",
        )  # fmt: skip
    return _rule("end of turn", "nothing to do", seen)


def ends_differ(report: Report) -> bool:
    """Whether both models end texts at the same places but with different ids (the bug that SimOPD reports)."""
    student, teacher = (report["ends"][side] for side in ("student", "teacher"))
    on_students, own = teacher["mass_on_students_ids"], teacher["mass"]
    return on_students is not None and own >= END_SHARE * student["mass"] and on_students < END_SHARE * own


def _rate(report: Report) -> dict[str, Any]:
    probe = report["learning_rate_probe"]
    if probe is None:
        return _rule(
            "learning rate",
            "auto: a probe before the run finds it",
            "it was not probed here (--probe-rate)",
            learning_rate=AUTO,
        )
    if "problem" in probe:
        if report["verdict"]["bridge"] and report["verdict"]["kind"] != "unrelated":
            return _rule(
                "learning rate", "auto: the same probe runs through the bridge", probe["problem"], learning_rate=AUTO
            )
        return _rule("learning rate", "none was found", probe["problem"])
    curve = ", ".join(
        f"{rate:g}: {'not finite' if loss is None else f'{loss:.3g}'}"
        for rate, loss in zip(probe["rates"], probe["held_out_loss"], strict=True)
    )
    return _rule(
        "learning rate", f"{probe['learning_rate']:g}",
        f"{probe['rule']} after {probe['steps']} steps from the same weights: {curve}; before {probe['held_out_loss_before']:.3g}",
        learning_rate=probe["learning_rate"],
    )  # fmt: skip


def _gap(report: Report) -> dict[str, Any] | None:
    accuracy = report["accuracy"]
    if accuracy is None:
        return None
    ours, theirs = (accuracy[side]["accuracy"] for side in ("student", "teacher"))
    low, high = accuracy["student"]["ci95"]
    unit = REWARD if REWARD in [accuracy[side].get("measure") for side in ("student", "teacher")] else ACCURACY
    mine, least, most, other = (in_words(value, unit) for value in (ours, low, high, theirs))
    shown = f"student {mine} [{least}, {most}], teacher {other} on {report['rollouts']['count']} problems"
    choose = "go on: the teacher is better" if theirs > high else "choose another teacher, or measure on more problems"
    return _rule("gap", choose, shown)


def bridge_command(report: Report) -> str:
    """The command `oprd bridge fit` for this pair, with the same settings."""
    return fit_command(report["student"], report["teacher"], report["prompts"], "bridges/mine", report["settings"])


def _changed(report: Report, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The report's settings that are not the default."""
    given = report["settings"]
    return {key: given[key] for key, default in defaults.items() if given.get(key, default) != default}
