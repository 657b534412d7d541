"""Tokens a second of each rollout engine beside the bare engine under it: what our layer costs.

Requests: prompts of uneven length, in groups that may write differently many tokens. Bare transformers is `model.generate` on the
same groups, padded left, in the order given. Bare vLLM is `LLM.generate` of the very `vllm.LLM` that our engine started, so what
ours adds is the hand-over of the weights and the records; without vLLM its rows are left out, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from oprd.bench.common import byte_tokenizer, describe_machine, machine_line, spread
from oprd.bench.update import SHAPES
from oprd.models import stop_token_ids, vocabulary_size
from oprd.rollout import ENGINES, RolloutEngine, Sampling
from oprd.rollout.vllm_engine import VLLMEngine

TITLES = {"transformers": "transformers", "vllm": "vLLM"}


@dataclass(frozen=True)
class Requests:
    """What is asked of the engines.

    Args:
        prompts: how many.
        prompt_tokens: fewest and most tokens of a prompt.
        completions: most tokens of a completion, a group of prompts each.
        shape: settings of `LlamaConfig` for the random model.
    """

    prompts: int = 64
    prompt_tokens: tuple[int, int] = (8, 128)
    completions: tuple[int, ...] = (16, 32, 64, 128)
    shape: dict[str, Any] = field(default_factory=lambda: dict(SHAPES["smollm2-135m"][1]))

    def groups(self) -> list[tuple[int, list[list[int]]]]:
        """Most tokens of a completion, and the prompts that may have that many, of lengths that go up and down."""
        low, high = self.prompt_tokens
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(low, high + 1, (self.prompts,), generator=generator).tolist()
        prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
        return [(most, prompts[i :: len(self.completions)]) for i, most in enumerate(self.completions)]

    def build(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The random model and its tokenizer."""
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model("llama", **{**self.shape, **special})
        return AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer(self.shape["vocab_size"])


QUICK = Requests(
    prompts=16, prompt_tokens=(4, 48), completions=(8, 16, 32),
    shape={
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
)  # fmt: skip

Groups = Sequence[tuple[int, list[list[int]]]]


def by_engine(engine: RolloutEngine, model: Any, groups: Groups, seed: int) -> int:
    """All requests through one of our engines; returns the tokens generated."""
    total = 0
    for most, prompts in groups:
        found = engine.generate(model, prompts, num_generations=1, sampling=Sampling(most), seed=seed)
        total += sum(found.completion_lengths)
    return total


@torch.no_grad()
def by_transformers(engine: RolloutEngine, model: Any, groups: Groups, seed: int) -> int:
    """Likewise by `model.generate` itself, one call a group; tokens up to the first stop token."""
    torch.manual_seed(seed)
    total = 0
    for most, prompts in groups:
        width = max(map(len, prompts))
        ids = torch.tensor([[engine.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=most, eos_token_id=engine.stop_token_ids,
            pad_token_id=engine.pad_token_id,
        )  # fmt: skip
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        ends = torch.isin(written, torch.tensor(engine.stop_token_ids))
        total += int((ends.cumsum(1) - ends.int() == 0).sum())
    return total


def by_vllm(engine: RolloutEngine, model: Any, groups: Groups, seed: int) -> int:
    """Likewise by `LLM.generate` of the `vllm.LLM` that our engine has started."""
    from vllm import SamplingParams

    llm = VLLMEngine._running
    total = 0
    for most, prompts in groups:
        parameters = SamplingParams(
            temperature=1.0, max_tokens=most, stop_token_ids=engine.stop_token_ids, ignore_eos=True, detokenize=False, seed=seed
        )  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        total += sum(len(output.outputs[0].token_ids) for output in outputs)
    return total


BARE: dict[str, Callable[[RolloutEngine, Any, Groups, int], int]] = {
    "transformers": by_transformers,
    "vllm": by_vllm,
}


def bench_rollout(requests: Requests, *, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every engine and the bare one under it, one after the other, round after round, in this process.

    Args:
        requests: what is asked.
        rounds: of timing.
        threads: CPU threads.
        say: takes a line of progress.

    Returns:
        `rows` (see `to_rows`), `left_out` (engine → why), `requests`, `rounds`, `machine`.
    """
    torch.set_num_threads(threads)
    model, tokenizer = requests.build()
    stops, groups = stop_token_ids(model, tokenizer), requests.groups()
    assert vocabulary_size(tokenizer) == requests.shape["vocab_size"], (
        "the engine would have rows of the head to suppress"
    )
    left_out = {
        name: "it has no bare engine in this process to be compared with" for name in ENGINES if name not in BARE
    }
    if find_spec("vllm") is None:
        left_out["vllm"] = "vLLM is not installed"
    largest = max(len(prompts) for _, prompts in groups)
    engines = {n: make(tokenizer, stops, batch_size=largest) for n, make in ENGINES.items() if n not in left_out}
    runs: dict[str, list[tuple[float, int]]] = {}
    for name, engine in engines.items():
        for kind in ("engine", "bare"):
            runs[f"{name} {kind}"] = []
        by_engine(engine, model, [(2, groups[0][1][:2])], 0)  # what is loaded or started at first use
    for number in range(rounds):
        for key in runs if number % 2 == 0 else list(reversed(runs)):
            name, kind = key.split()
            work = by_engine if kind == "engine" else BARE[name]
            start = time.perf_counter()
            tokens = work(engines[name], model, groups, number)
            runs[key].append((time.perf_counter() - start, tokens))
        say(f"round {number + 1} of {rounds}")
    return {
        "rows": to_rows(runs),
        "left_out": left_out,
        "requests": asdict(requests),
        "rounds": rounds,
        "machine": describe_machine(threads),
    }


def to_rows(runs: Mapping[str, Sequence[tuple[float, int]]]) -> list[dict[str, Any]]:
    """A row an engine, from (seconds, tokens) a round of `"<name> engine"` and `"<name> bare"`.

    Returns:
        Rows of `name`; `tokens_per_second` and `bare_tokens_per_second`, `ratio` of the two in each round, all with `median` and
        `range`; and the `tokens` and `bare_tokens` of all rounds.
    """
    rows = []
    for name in dict.fromkeys(key.split()[0] for key in runs):
        own, bare = ([tokens / seconds for seconds, tokens in runs[f"{name} {kind}"]] for kind in ("engine", "bare"))
        rows.append({
            "name": name,
            "tokens_per_second": spread(own, 2),
            "bare_tokens_per_second": spread(bare, 2),
            "ratio": spread([one / other for one, other in zip(own, bare, strict=True)]),
            "tokens": sum(tokens for _, tokens in runs[f"{name} engine"]),
            "bare_tokens": sum(tokens for _, tokens in runs[f"{name} bare"]),
        })  # fmt: skip
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    asked, shape = report["requests"], report["requests"]["shape"]
    low, high = asked["prompt_tokens"]
    lines = [
        f"{machine_line(report['machine'])} Random Llama, {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
        f"vocabulary {shape['vocab_size']:,}; {asked['prompts']} prompts of {low} to {high} tokens, completions of at most "
        f"{', '.join(map(str, asked['completions']))} tokens; {report['rounds']} rounds, medians and ranges.",
        "",
        "| engine | tokens/s | bare, tokens/s | engine over bare |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        own, bare, ratio = (row[key] for key in ("tokens_per_second", "bare_tokens_per_second", "ratio"))
        cells = [f"{v['median']:.0f} [{v['range'][0]:.0f}, {v['range'][1]:.0f}]" for v in (own, bare)]
        low, high = ratio["range"]
        lines.append(f"| {TITLES[row['name']]} | {' | '.join(cells)} | {ratio['median']:.3f} [{low:.3f}, {high:.3f}] |")
    lines += [f"\n{TITLES.get(name, name)} is left out: {why}." for name, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"
