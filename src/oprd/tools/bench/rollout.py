"""Tokens per second of each rollout engine, compared with the bare backends: overhead of our layer, gain of continuous batching.

Prompts have uneven length and are sent in one call. Completions end at stop tokens, so they have uneven length too. The seed, and
therefore an engine's completions, are the same in every round. The bare backends generate completions of the same lengths:
`model.generate` with all prompts in one left-padded batch, and `LLM.generate` of the `vllm.LLM` that our engine started. The bare
vLLM call omits weight transfer, per-completion seeds and records. No measurement includes log-probabilities, which a trainer needs
only in diagnostic steps (`diagnostic_steps`).

`generate` computes all rows until the longest is done, so its time depends only on the longest completion. The benchmark requires
the same longest length in all engines, so one time of `generate` serves them all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from oprd.rollouts.engine import RolloutEngine, Sampling
from oprd.rollouts.engines import ENGINES
from oprd.rollouts.vllm.engine import VLLMEngine
from oprd.tools.bench.common import describe_machine, machine_line, spread, vllm_environment
from oprd.tools.bench.requests import Requests
from oprd.types import Rollouts

TITLES = {"generate": "bare `generate`", "vllm_bare": "bare vLLM"}
LEFT_OUT = {"vllm_server": "it runs in a process of its own"}
WANTED = {"over_bare": 0.95, "over_generate": 2.0}
"""Targets of the engine `vllm`: its tokens per second relative to bare vLLM and to `generate`."""
SEED = 0


@dataclass(frozen=True)
class Timed:
    """One pass: wall-clock seconds, CPU seconds of the process, generated tokens, and seconds of weight transfer."""

    seconds: float
    cpu_seconds: float
    tokens: int
    sync_seconds: float = 0.0


def by_engine(engine: RolloutEngine, model: Any, prompts: list[list[int]], most: int) -> Rollouts:
    """Sample all completions with one of our engines, as in a training step without diagnostics."""
    return engine.generate(model, prompts, num_generations=1, sampling=Sampling(most), seed=SEED).rollouts


class _StopAtLengths(StoppingCriteria):
    """Stops row i after `lengths[i]` new tokens."""

    def __init__(self, width: int, lengths: Sequence[int]) -> None:
        self.width, self.lengths = width, torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] - self.width >= self.lengths


@torch.no_grad()
def by_generate(engine: RolloutEngine, model: Any, prompts: list[list[int]], lengths: Sequence[int]) -> int:
    """Generate `lengths[i]` tokens for prompt i in one call of `model.generate`; returns the number of tokens."""
    torch.manual_seed(SEED)
    width = max(map(len, prompts))
    ids = torch.tensor([[engine.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max(lengths), pad_token_id=engine.pad_token_id
    )  # fmt: skip
    saved, model.generation_config = model.generation_config, config  # otherwise its end token would also stop rows
    try:
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[_StopAtLengths(width, lengths)],
        )
    finally:
        model.generation_config = saved
    assert written.shape[1] - width == max(lengths)
    return sum(lengths)


def by_vllm(prompts: list[list[int]], lengths: Sequence[int]) -> int:
    """Generate all completions in one `LLM.generate` call on our engine's `vllm.LLM`; returns the number of tokens."""
    from vllm import SamplingParams

    parameters = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = VLLMEngine.running.generate(asked, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


class SyncClock:
    """Sums in `seconds` the time of weight transfer to a `vllm.LLM`: all calls by `VLLMEngine` except `generate`."""

    def __init__(self, llm: Any) -> None:
        self.seconds = 0.0
        for name in ("collective_rpc", "apply_model", "reset_prefix_cache"):
            setattr(llm, name, partial(self._timed, getattr(llm, name)))

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def bench_rollout(requests: Requests, *, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all engines and bare backends in this process, in turn in each round.

    Defaults for vLLM on a CPU: 1 GiB for keys and values (`VLLM_CPU_KVCACHE_SPACE`), no thread binding
    (`VLLM_CPU_OMP_THREADS_BIND=nobind`).

    Args:
        requests: model and prompts.
        rounds: rounds of timing, after one warm-up pass per engine that also determines the completions' lengths.
        threads: CPU threads.
        say: called with progress lines.

    Returns:
        `rows` (see `to_rows`), `targets`, `left_out` (engine → reason), `requests`, `prompt_lengths`, `rounds`, `machine`.

    Raises:
        ValueError: vLLM is installed and `OMP_NUM_THREADS`, which its kernels use, is not `threads`; or the engines' longest
            completions differ in length.
    """
    left_out = dict(LEFT_OUT)
    if find_spec("vllm") is None:
        left_out["vllm"] = "vLLM is not installed"
    elif os.environ.get("OMP_NUM_THREADS") != str(threads):
        raise ValueError(
            f"threads: {threads}, but OMP_NUM_THREADS, which vLLM's kernels use, is {os.environ.get('OMP_NUM_THREADS')!r}; "
            f"start it as OMP_NUM_THREADS={threads} oprd bench rollout --threads {threads}"
        )
    torch.set_num_threads(threads)
    os.environ.update(vllm_environment())
    model, tokenizer, stops, prompts = requests.build()
    engines = {n: make(tokenizer, stops, batch_size=len(prompts)) for n, make in ENGINES.items() if n not in left_out}
    lengths = {n: by_engine(e, model, prompts, requests.completion).completion_lengths for n, e in engines.items()}
    check_longest(lengths)
    say(f"completions drawn: {', '.join(f'{sum(n)} tokens by {name}' for name, n in lengths.items())}")
    ways = ways_of(engines, model, prompts, lengths, requests.completion)
    sync = SyncClock(VLLMEngine.running) if "vllm" in engines else None
    timed: dict[str, list[Timed]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else list(reversed(ways)):
            timed[name].append(time_one(ways[name], sync))
        say(f"round {number + 1} of {rounds}")
    rows = to_rows(timed, lengths)
    return {
        "rows": rows,
        "targets": judge(rows),
        "left_out": left_out,
        "requests": asdict(requests),
        "prompt_lengths": three(list(map(len, prompts))),
        "rounds": rounds,
        "machine": {**describe_machine(threads), "dtype": requests.dtype},
    }


def check_longest(lengths: Mapping[str, Sequence[int]]) -> None:
    """Check that the longest completion is equally long in all engines; otherwise one time of `generate` would not serve all."""
    longest = {name: max(own) for name, own in lengths.items()}
    if len(set(longest.values())) > 1:
        found = ", ".join(f"{n} by {name}" for name, n in longest.items())
        raise ValueError(
            f"completion: the longest must be equally long in all engines, but has {found} tokens; set a limit that all reach"
        )


def ways_of(
    engines: Mapping[str, RolloutEngine],
    model: Any,
    prompts: list[list[int]],
    lengths: Mapping[str, list[int]],
    most: int,
) -> dict[str, Callable[[], int]]:
    """Name → a pass that returns the number of tokens: `generate`, each engine, and bare vLLM before the engine `vllm`."""

    def count(engine: RolloutEngine) -> int:
        return sum(by_engine(engine, model, prompts, most).completion_lengths)

    compared = "vllm" if "vllm" in engines else next(iter(engines))  # `generate` uses this engine's completion lengths
    ways: dict[str, Callable[[], int]] = {
        "generate": partial(by_generate, engines[compared], model, prompts, lengths[compared])
    }
    for name, engine in engines.items():
        if name == "vllm":
            ways["vllm_bare"] = partial(by_vllm, prompts, lengths[name])
        ways[name] = partial(count, engine)
    return ways


def time_one(way: Callable[[], int], sync: SyncClock | None) -> Timed:
    """Time one pass. First clears vLLM's prefix cache, so that it cannot reuse keys and values of an earlier pass."""
    if sync is not None:
        VLLMEngine.running.reset_prefix_cache()
    before = 0.0 if sync is None else sync.seconds
    start, cpu = time.perf_counter(), time.process_time()
    tokens = way()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return Timed(seconds, cpu_seconds, tokens, 0.0 if sync is None else sync.seconds - before)


def three(values: Sequence[int]) -> list[float]:
    """Minimum, median and maximum."""
    return [min(values), statistics.median(values), max(values)]


def to_rows(timed: Mapping[str, Sequence[Timed]], lengths: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """One row per engine or bare backend. Ratios are computed within a round.

    Args:
        timed: name → its passes; includes `generate`, and `vllm_bare` if it includes `vllm`.
        lengths: engine → tokens of each of its completions.

    Returns:
        Rows with `name`, `tokens` per pass, and `lengths` (minimum, median, maximum; None for bare backends). Each with `median`
        and `range`: `seconds`, `cpu_share` (CPU seconds / seconds, about the number of threads on an idle machine),
        `tokens_per_second`, `generate_tokens_per_second` (the same tokens by `generate` in the same round) and the ratio
        `over_generate`; for the engine `vllm` also `over_bare` and `sync_seconds`, None for others.
    """
    rows = []
    for name, passes in timed.items():
        rates = [one.tokens / one.seconds for one in passes]
        generate_rates = [one.tokens / other.seconds for one, other in zip(passes, timed["generate"], strict=True)]
        bare = [one.tokens / one.seconds for one in timed["vllm_bare"]] if name == "vllm" else []
        rows.append({
            "name": name,
            "tokens": passes[0].tokens,
            "lengths": three(lengths[name]) if name in lengths else None,
            "seconds": spread([one.seconds for one in passes]),
            "cpu_share": spread([one.cpu_seconds / one.seconds for one in passes]),
            "tokens_per_second": spread(rates, 2),
            "generate_tokens_per_second": spread(generate_rates, 2),
            "over_generate": spread([own / other for own, other in zip(rates, generate_rates, strict=True)]),
            "over_bare": spread([own / other for own, other in zip(rates, bare, strict=True)]) if bare else None,
            "sync_seconds": spread([one.sync_seconds for one in passes]) if bare else None,
        })  # fmt: skip
    return rows


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the medians of the engine `vllm` with `WANTED`: `wanted`, `found`, `met`; empty if vLLM was not measured."""
    found = {key: row[key]["median"] for row in rows if row["name"] == "vllm" for key in WANTED}
    return {key: {"wanted": WANTED[key], "found": value, "met": value >= WANTED[key]} for key, value in found.items()}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    asked, shape = report["requests"], report["requests"]["shape"]
    model = asked["model"] or (
        f"random Llama, {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, vocabulary {shape['vocab_size']:,}"
    )
    low, middle, high = report["prompt_lengths"]
    lines = [
        f"{machine_line(report['machine'])} Model: {model}. {asked['prompts']} prompts of {low} to {high} tokens (median "
        f"{middle:g}), asked for at once; completions of at most {asked['completion']} tokens end by the model's stop tokens. "
        f"{report['rounds']} rounds; medians, in brackets the range over rounds; ratios are made within a round.",
        "",
        "| way | tokens (least, median, most) | seconds | tokens/s | the same by `generate` | over `generate` | over bare vLLM | "
        "seconds of handing over weights |",
        "| --- " * 8 + "|",
    ]
    for row in report["rows"]:
        lengths = f" ({', '.join(f'{n:g}' for n in row['lengths'])})" if row["lengths"] else ""
        cells = [
            TITLES.get(row["name"], f"engine `{row['name']}`"),
            f"{row['tokens']}{lengths}",
            _cell(row["seconds"], 2),
        ]
        cells += [_cell(row["tokens_per_second"], 1), _cell(row["generate_tokens_per_second"], 1)]
        cells += [_cell(row["over_generate"], 2), _cell(row["over_bare"], 3), _cell(row["sync_seconds"], 2)]
        lines.append(f"| {' | '.join(cells)} |")
    shares = [row["cpu_share"]["range"][0] for row in report["rows"]]
    lines += ["", f"CPU seconds over seconds: at least {min(shares):.2f} in every pass."]
    names = {"over_bare": "of bare vLLM's tokens a second", "over_generate": "times `generate`'s"}
    for key, target in report["targets"].items():
        verdict = f"{target['found']:.3f} ({'met' if target['met'] else 'not met'})"
        lines.append(f"Target of the engine `vllm`: at least {target['wanted']} {names[key]}: {verdict}.")
    lines += [f"Engine `{name}` is left out: {why}." for name, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "–"
    low, high = value["range"]
    return f"{value['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
