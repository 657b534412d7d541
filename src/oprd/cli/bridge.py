"""`oprd bridge fit` and `oprd bridge inspect`: projections between a student and a teacher of another shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oprd.cli.options import (
    TEACHER_MODEL,
    DatasetConfig,
    JsonFile,
    MergeSystem,
    PromptColumn,
    SpecialMap,
    SplitSpecial,
    TeacherSystem,
    TeacherTemplate,
    Template,
    TemplateDate,
    check_json,
    is_given,
    mapping_option,
    write_report,
)
from oprd.files import write_json

if TYPE_CHECKING:
    from oprd.run_config import RunConfig

app = typer.Typer(help="Fit and inspect a bridge to a teacher of another shape.", no_args_is_help=True)


# Long help texts, so that the signature below keeps one line per option.
_Layers = Annotated[str, typer.Option(help="Student layers: all, last, even, odd, or a list such as [1,14,28].")]
_Rank = Annotated[
    int | None, typer.Option(help="Directions to use (default: the median of the layers' suggested ranks).")
]
_Ridge = Annotated[
    str, typer.Option(help="Ridge as a share of each dimension's variance; auto: the best on held-out rollouts.")
]
_LayerMap = Annotated[str, typer.Option(help="proportional, cka, or a list with each student layer's teacher layer.")]


@app.command("fit")
def fit(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="Recipe of the run: models, prompts, lengths and templates are its own.")
    ] = None,
    teacher_id: Annotated[str | None, typer.Option(help="With --config: one of its several teachers.")] = None,
    student: Annotated[str | None, typer.Option(help="Folder, hub name, or embedded:tiny/student.")] = None,
    teacher: Annotated[str | None, TEACHER_MODEL] = None,
    prompts: Annotated[
        str | None, typer.Option(help=".parquet, .jsonl, .json, hub name, or generated:addition.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the bridge.", show_default="the recipe's bridge")
    ] = None,
    limit: Annotated[int, typer.Option(min=10, help="Prompts to use, one rollout each.")] = 2000,
    max_completion_length: Annotated[
        int, typer.Option(min=1, help="Most tokens of a rollout; with --config by default the recipe's.")
    ] = 512,
    layers: _Layers = "all",
    rank: _Rank = None,
    max_rank: Annotated[int | None, typer.Option(help="Directions to keep in the file (default: all).")] = None,
    scale: Annotated[str, typer.Option(help="Units of the projected states: none, mean, direction.")] = "mean",
    projector: Annotated[str | None, typer.Option(help="least_squares (default), procrustes, cca.")] = None,
    ridge: _Ridge = "1e-4",
    intercept: Annotated[bool, typer.Option(help="Subtract the student's mean.")] = True,
    layer_map: _LayerMap = "proportional",
    held_out: Annotated[float, typer.Option(help="Share of rollouts to judge the fit by.")] = 0.2,
    micro_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most padded tokens of one forward pass; with --config by default the recipe's.")
    ] = 16384,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the rollouts.")] = 0,
    max_prompt_length: Annotated[int | None, typer.Option(help="Leave out (and count) longer prompts.")] = None,
    prompt_column: PromptColumn = None,
    dataset_config: DatasetConfig = None,
    merge_system_prompt: MergeSystem = False,
    chat_template_kwargs: Template = None,
    chat_template_date: TemplateDate = None,
    teacher_chat_template_kwargs: TeacherTemplate = None,
    teacher_system_prompt: TeacherSystem = None,
    special_token_map: SpecialMap = None,
    split_special_tokens: SplitSpecial = True,
    teacher_dtype: Annotated[str, typer.Option(help="Of the teacher's weights; auto: the checkpoint's.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the models.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Fit a bridge in closed form on the student's own rollouts, print its fit on held-out rollouts, and save it.

    Give the recipe of the run, or a student, a teacher and prompts.
    """
    from oprd.cli.console import quiet_libraries

    check_json(json_file)
    quiet_libraries()
    fitting: dict[str, Any] = {"rank": rank, "max_rank": max_rank, "scale": scale, "intercept": intercept}
    fitting |= {"ridge": _ridge(ridge), **({"projector": projector} if projector else {})}
    own: dict[str, Any] = {
        "layers": _layers("layers", layers), "maps": _layers("layer_map", layer_map), "held_out": held_out, "seed": seed,
        "teacher_id": teacher_id, "limit": limit, "fitting": fitting,
    }  # fmt: skip
    run, folder = _run_of_options(context) if config is None else _run_of_recipe(context)
    write_report(json_file, fit_and_save(run, folder, **own))


def fit_and_save(
    run: RunConfig, folder: Path, *, fitting: Mapping[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """Fit a run's bridge into a new folder, and print how well it fits.

    Args:
        run: the configuration.
        folder: of the bridge.
        fitting: arguments of `Bridge.fit`, as in `fit_for_run`.
        **own: further arguments of `fit_for_run`.

    Returns:
        The description of the bridge.

    Raises:
        ValueError: the folder is there, or as `fit_for_run`.
    """
    from oprd.bridge.files import refuse_existing
    from oprd.cli.console import count_completions, say
    from oprd.tools.fit_for_run import fit_for_run

    refuse_existing(folder)
    fitting = fitting or {}
    bridge = fit_for_run(run, fitting=fitting, on_rollouts=count_completions(), **own)
    bridge.save(folder)
    description = _show(bridge, given={"rank": fitting.get("rank"), "projector": fitting.get("projector")})
    say(f"written to {folder}; train with bridge: {folder}, or look again: oprd bridge inspect {folder}")
    return description


_OF_FIT = {
    "config", "teacher_id", "out", "limit", "layers", "rank", "max_rank", "scale", "projector", "ridge", "intercept", "layer_map",
    "held_out", "seed", "json_file",
}  # fmt: skip
"""Options of the fit itself. All others are keys of a recipe."""
_OF_BOTH = ("max_completion_length", "micro_batch_tokens")
"""Keys of a recipe that an option may replace for the fit."""
_RECIPE_KEYS = {
    "student": "model", "teacher": "teacher_model", "prompts": "train_dataset", "split": "train_split",
    "teacher_dtype": "teacher_model_init_kwargs",
}  # fmt: skip
"""Options whose key in a recipe has another name."""


def _run_of_recipe(context: typer.Context) -> tuple[RunConfig, Path]:
    """The run of --config, and the bridge's folder: --out, or the one that the recipe names.

    Raises:
        ValueError: an option that is a key of recipes, no folder, or as `RunConfig.load`.
    """
    from oprd.run_config import RunConfig
    from oprd.tools.fit_for_run import bridge_folder_of

    config, out = context.params["config"], context.params["out"]
    for name in context.params:
        if name not in {*_OF_FIT, *_OF_BOTH} and is_given(context, name):
            raise ValueError(f"{name}: it does not go with --config; set {_RECIPE_KEYS.get(name, name)} in {config}")
    changed = {name: context.params[name] for name in _OF_BOTH if is_given(context, name)}
    run = RunConfig.load_on_cpu(config, changed)
    folder = out or bridge_folder_of(run, context.params["teacher_id"])
    if folder is None:
        raise ValueError(f"out: {config} names no bridge; say where to write it: --out FOLDER")
    return run, Path(folder)


def _run_of_options(context: typer.Context) -> tuple[RunConfig, Path]:
    """A run as the options describe it, and the bridge's folder.

    Raises:
        ValueError: an option is missing, or as `RunConfig.parse`.
    """
    from oprd.run_config import RunConfig

    options = dict(context.params)
    for name in ("student", "teacher", "prompts", "out"):
        if options[name] is None:
            raise ValueError(
                f"{name}: it is missing; give --student, --teacher, --prompts and --out, or --config RECIPE"
            )
    if options["teacher_id"] is not None:
        raise ValueError(f"teacher_id: {options['teacher_id']!r} names a teacher of --config, which is missing")
    for name in ("chat_template_kwargs", "teacher_chat_template_kwargs", "special_token_map"):
        options[name] = mapping_option(name, options[name])
    dtype = options["teacher_dtype"]
    options["teacher_dtype"] = None if dtype == "auto" else {"dtype": dtype}
    values = {_RECIPE_KEYS.get(name, name): value for name, value in options.items() if name not in _OF_FIT}
    return RunConfig.parse({**values, "output_dir": "is not written"}, "oprd bridge fit"), options["out"]


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(help="A bridge's folder.")],
    output_dir: Annotated[Path | None, typer.Option(help="Write bridge.json and rank_curve.png here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print how well a bridge fits, layer by layer; with --output-dir also write it as JSON and a picture."""
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.bridge import Bridge
    from oprd.tools.show_bridge import plot_bridge

    if output_dir is not None and output_dir.resolve() == folder.resolve():
        raise ValueError(
            f"output_dir: {output_dir} is the bridge's own folder, whose bridge.json would be lost; choose another"
        )
    check_json(json_file)
    description = _show(Bridge.load(folder))
    write_report(json_file, description)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "bridge.json", description)
        plot_bridge(description, output_dir / "rank_curve.png")
        say(f"written to {output_dir} (bridge.json, rank_curve.png)")


def _layers(name: str, text: str) -> str | list[Any]:
    """Parse a name, or a YAML list of layers; a single number becomes a list of one."""
    import yaml

    from oprd.data.yaml_text import load_yaml

    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {text!r} cannot be read: {error}") from error
    return value if isinstance(value, str | list) else [value]


def _ridge(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # "auto"; the fit refuses anything else


def _show(bridge: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Print a bridge; of one that was just fitted with the options `given`, also why it has its rank and projector.

    Returns:
        What `describe_bridge` finds.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    from oprd.bridge.curve import HOPELESS, HOPELESS_ADVICE
    from oprd.cli.console import console, say
    from oprd.tools.show_bridge import describe_bridge, explain_choice

    description = describe_bridge(bridge)
    rank = description["rank"]
    table = Table(
        "student layer", "teacher layer", "CKA", "predictable", "suggested rank", f"explained at {rank}", f"R² at {rank}",
        f"cosine at {rank}", box=SIMPLE, pad_edge=False,
    )  # fmt: skip
    for row in description["layers"]:
        numbers = (row["cka"], row["predictable"])
        at = (row["explained"][rank - 1], row["rank_r2"][rank - 1], row["rank_cosine"][rank - 1])
        table.add_row(
            str(row["student_layer"]), str(row["teacher_layer"]), *(f"{n:.3f}" for n in numbers), str(row["suggested_rank"]),
            *(f"{n:.3f}" for n in at),
        )  # fmt: skip
    say(f"{description['teacher']} -> {description['student']}, rank {rank} of {description['max_rank']}")
    console.print(table)
    layers = (
        f", student layers {', '.join(map(str, description['usable_layers']))}" if description["usable_layers"] else ""
    )
    advice = f": {HOPELESS_ADVICE}" if description["verdict"] == HOPELESS else ""
    say(f"verdict on held-out rollouts: {description['verdict']}{layers}{advice}")
    for line in explain_choice(description, given) if given is not None else ():
        say(line)
    return description
