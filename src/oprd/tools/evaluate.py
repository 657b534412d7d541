"""`oprd eval`: one model on one set of problems."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from oprd.data.prompts import prepare_prompts
from oprd.files import write_json
from oprd.resolve import load
from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import make_engine
from oprd.rollouts.probe import check_decoding, probe_decoding
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.runs.folder import EVAL_COMPLETIONS, RunFolder
from oprd.sanitize import redacted
from oprd.tasks.evaluation import evaluate
from oprd.tasks.problems import load_rows
from oprd.tasks.task import decided_by, get_task, with_instruction

logger = logging.getLogger("oprd")


def evaluate_checkpoint(
    model: str,
    dataset: str,
    *,
    task: str,
    k: int,
    sampling: Sampling,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 64,
    engine: str = "transformers",
    on_batch: Callable[[int, int], None] | None = None,
    dtype: str = "auto",
    seed: int = 0,
    instruction: bool = True,
    split_special_tokens: bool = True,
    output_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate one model on one set of problems; with `output_dir`, write `eval.json` and `eval_completions.jsonl` there.

    Args:
        model: folder (also of a PEFT adapter), hub name or embedded name.
        dataset: path, hub name or `generated:<task>`.
        task: how answers are graded.
        k: samples a problem.
        sampling: how they are drawn.
        limit: first problems only.
        split: of a hub dataset or generated task.
        batch_size: completions generated together.
        engine: what samples: transformers or vllm.
        on_batch: called with (completions done, of all) as they are made, by engines that work in batches.
        dtype: of the weights; "auto" keeps the checkpoint's.
        seed: of the sampling.
        instruction: append the task's instruction to problems that do not say how to answer; how many is in the result.
        split_special_tokens: read control tokens in plain prompts as text (`OPRDConfig.split_special_tokens`).
        output_dir: where the result is written.
        trust_remote_code: run code that comes with the model.

    Returns:
        The measures, with the settings they were measured under.

    Raises:
        ValueError: a model, dataset, task or setting that does not fit.
    """
    grading = get_task(task)
    rows = load_rows(dataset, split, limit, seed)
    instructed = 0
    if instruction:
        rows, instructed = with_instruction(grading, rows)
        if instructed:
            logger.info("%s: appended %r to %d of %d prompts", dataset, grading.instruction, instructed, len(rows))
    loaded = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    assert loaded.tokenizer is not None, "it was loaded with the model"
    prompts = prepare_prompts(
        rows, loaded.tokenizer, name=dataset, max_completion_length=sampling.max_completion_length,
        context_length=loaded.info.context_length, split_special_tokens=split_special_tokens,
    )  # fmt: skip
    stops = loaded.info.stop_token_ids
    sampler = make_engine(engine, loaded.tokenizer, stops, batch_size=batch_size)
    if isinstance(sampler, TransformersEngine):
        check_decoding(probe_decoding(loaded.model))
        sampler.on_batch = on_batch
    started = time.perf_counter()
    with grading.grader() as grader:
        result = evaluate(loaded.model, sampler, prompts, grader, k=k, sampling=sampling, seed=seed)
        stats = dict(decided_by(grader))
    settings = {
        "model": model,
        "dataset": dataset,
        "task": task,
        "seed": seed,
        "instructed": instructed,
        **dataclasses.asdict(sampling),
    }
    summary = {**result.summary, **settings, "grading": stats, "seconds": round(time.perf_counter() - started, 2)}
    if output_dir is not None:
        folder = RunFolder(output_dir)
        shown = [prompts[row].row.prompt for row in result.rollouts.rows]
        with folder.hold():
            folder.write_completions(EVAL_COMPLETIONS, shown, result.rollouts, result.correct)
            write_json(folder.path / "eval.json", redacted(summary, by_name=False))
    return summary
