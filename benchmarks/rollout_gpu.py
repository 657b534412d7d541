"""Tokens per second of each rollout engine on a GPU: SmolLM2-135M's shape, 64 and 512 rows of 256 tokens, float32 and bfloat16.

    python benchmarks/rollout_gpu.py --json benchmarks/results/rollout_gpu.json      # on a GPU: at most nine minutes
    python benchmarks/rollout_gpu.py --quick                                        # on any machine: tiny, seconds

Eight rows share a prompt. "full" rows are all 256 tokens long, up to a stop token that is drawn once in 49,152; "drawn" rows end
after 128 tokens in the mean. A way is run once on few tokens and then twice; the shorter time counts. What does not fit the time is
named in the table, and so is what fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from oprd.files import write_json
from oprd.models.loading import parse_dtype
from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import make_engine
from oprd.rollouts.transformers_engine import left_padded
from oprd.tools.bench.common import byte_tokenizer, describe_machine
from oprd.tools.bench.update import SHAPES

GENERATIONS = 8
QUICK_SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rows to be written.

    Args:
        rows: completions, eight of each prompt.
        tokens: most of a completion.
        dtype: of the weights.
        ends: "full" or "drawn".
    """

    rows: int
    tokens: int
    dtype: str
    ends: str = "full"


CASES = (
    *(Case(rows, 256, dtype) for dtype in ("bfloat16", "float32") for rows in (64, 512)),
    Case(512, 256, "bfloat16", "drawn"),
)
QUICK_CASES = (Case(16, 8, "float32"), Case(16, 8, "float32", "drawn"))


def ways(device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → engine and its arguments; `generate_static` is transformers' static cache with a compiled step, a CUDA graph."""
    found: dict[str, tuple[str, dict[str, Any]]] = {"generate": ("transformers", {}), "decode": ("decode", {})}
    if device == "cuda":
        found["generate_static"] = ("static", {})
    found["continuous"] = ("transformers_continuous", {})
    if device == "cuda":
        found["continuous_graph"] = ("transformers_continuous", {"batching_kwargs": {"use_cuda_graph": True}})
        if find_spec("vllm") is not None:
            found["vllm"] = ("vllm", {"gpu_memory_utilization": 0.3})
    return found


def build(case: Case, device: str, *, quick: bool) -> tuple[nn.Module, Any, list[list[int]], list[int]]:
    """Model, tokenizer, prompts and stop ids."""
    shape = QUICK_SHAPE if quick else SHAPES["smollm2-135m"][1]
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**shape, **special}))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, 97, (max(case.rows // GENERATIONS, 1),), generator=generator).tolist()
    prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in sizes]
    stops = [2] if case.ends == "full" else list(range(2, shape["vocab_size"], max(case.tokens // 2, 2)))
    return model.to(device, parse_dtype(case.dtype)).eval(), byte_tokenizer(shape["vocab_size"]), prompts, stops


@torch.no_grad()
def by_static_cache(model: nn.Module, prompts: Sequence[list[int]], stops: list[int], tokens: int) -> int:
    """`generate` with a static cache, whose step transformers compiles; returns the number of tokens up to each end."""
    rows = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    ids, mask = left_padded(rows, 0, model.device)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0, eos_token_id=stops,
        cache_implementation="static",
    )  # fmt: skip
    torch.manual_seed(0)
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    ended = torch.isin(written, torch.tensor(stops, device=written.device)).cumsum(-1)
    return int((ended.cumsum(-1) <= 1).sum())


def way_of(name: str, made: tuple[Any, ...], case: Case, settings: tuple[str, dict[str, Any]]) -> Callable[[int], int]:
    """A function that writes all rows of at most so many tokens each, and returns the number of tokens."""
    model, tokenizer, prompts, stops = made
    engine_name, kwargs = settings
    if engine_name == "static":
        return lambda tokens: by_static_cache(model, prompts, stops, tokens)
    engine = make_engine(engine_name, tokenizer, stops, batch_size=case.rows, **kwargs)

    def write(tokens: int) -> int:
        sampled = engine.generate(model, prompts, num_generations=GENERATIONS, sampling=Sampling(tokens), seed=0)
        return sum(sampled.rollouts.completion_lengths)

    return write


def measure(name: str, made: tuple[Any, ...], case: Case, settings: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of one way: tokens, seconds of each run, tokens per second, peak memory; or `failed`."""
    cuda = made[0].device.type == "cuda"
    row: dict[str, Any] = {"name": name, **vars(case), "generations": GENERATIONS}
    try:
        write = way_of(name, made, case, settings)
        write(min(8, case.tokens))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            tokens = write(case.tokens)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # one way that fails leaves the others their time
        return {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    best = round(tokens / min(seconds), 1)
    return {**row, "written": tokens, "seconds": seconds, "tokens_per_second": best, "peak_gib": peak}


def run(cases: Sequence[Case], device: str, budget: float, *, quick: bool) -> dict[str, Any]:
    """Measure every way in every case while there is time. A way that failed in one case is not tried in another."""
    start, rows, failed = time.perf_counter(), [], set()
    for case in cases:
        made = build(case, device, quick=quick)
        for name, settings in ways(device).items():
            if name in failed:
                continue
            if time.perf_counter() - start > budget:
                rows.append({"name": name, **vars(case), "failed": "not run: no time left"})
                continue
            rows.append(measure(name, made, case, settings))
            if "failed" in rows[-1]:
                failed.add(name)
            print(line(rows[-1], rows), flush=True)
        del made
        if device == "cuda":
            torch.cuda.empty_cache()
    machine = describe_machine(torch.get_num_threads())
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {"rows": rows, "machine": machine, "seconds": round(time.perf_counter() - start, 1)}


def line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    case = f"{row['rows']:4} x {row['tokens']} {row['dtype']:9} {row['ends']:6} {row['name']:17}"
    if "failed" in row:
        return f"{case} {row['failed']}"
    same = ("rows", "tokens", "dtype", "ends")
    bare = next((r for r in rows if r["name"] == "generate" and all(r[k] == row[k] for k in same)), {})
    over = row["tokens_per_second"] / bare["tokens_per_second"] if "tokens_per_second" in bare else float("nan")
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:6.1f} GiB"
    return f"{case} {row['written']:7} tokens {row['tokens_per_second']:10.1f} /s {over:6.2f} x generate {peak}"


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few tokens")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which no further way is begun")
    parser.add_argument("--json", type=Path, help="write all rows here")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.quick:
        sys.exit("rollout_gpu: there is no GPU here; --quick runs a tiny model on the CPU")
    report = run(QUICK_CASES if given.quick else CASES, device, given.budget, quick=given.quick)
    if given.json is not None:
        write_json(given.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
