"""Measure for two seconds what this machine's CPU does with pieces of a run: its products, memory, and steps of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, silu

from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import ENGINES, make_engine
from oprd.tools.doctor.time import Device, measure_device
from oprd.tools.doctor.workload import Workload

_WIDE_VOCABULARY, _STEPS, _DEEP = 8192, 16, 7
_LARGEST = 2**23  # numbers of one operand


def probe_cpu(work: Workload, engine: str = "decode") -> Device:
    """Measure this CPU with the threads that PyTorch uses now. Touches no file and no random state but its own.

    Products have the workload's width and rows, as far as `_LARGEST` allows. With one thread the clock is the CPU time of the
    process, so other processes hardly count; with more it is the wall clock.

    Args:
        work: the run.
        engine: `rollout_engine`; the default where it needs another process or further packages.
    """
    dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
    rows = min(work.generation_batch, work.rollouts)
    together = min(max(rows, 8), 64)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
        torch.manual_seed(0)
        short, long, wide = _step_seconds(engine, together)
        layer = (long - short) / (_DEEP - 1)
        block = (_backward_seconds(_DEEP) - _backward_seconds(1)) / (_DEEP - 1)
    return Device(
        tflops=_products(work, dtype) / 1e12,
        bandwidth=_weights_read(work, dtype, rows) / 1e9,
        flops_share=1.0,
        bandwidth_share=1.0,
        written=_written(work) / 1e9,
        updated=_updated(work) / 1e9,
        layer_seconds=max(0.0, layer),
        step_seconds=max(0.0, short - layer),
        logit_seconds=max(0.0, (wide - short) / (together * _WIDE_VOCABULARY)),
        block_seconds=max(0.0, block),
        threads=torch.get_num_threads(),
    )


def measure_machine(work: Workload, engine: str = "decode", *, cpu: bool = False) -> Device:
    """This machine: its GPU, or its CPU where there is none or `cpu` asks for it.

    Args:
        work: what is to run.
        engine: as in `probe_cpu`.
        cpu: measure the CPU in any case.
    """
    if cpu or not torch.cuda.is_available():
        return probe_cpu(work, engine)
    return measure_device(torch.bfloat16 if work.compute_bytes == 2 else torch.float32, torch.device("cuda"))


def best(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    seconds = []
    for _ in range(times):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


@torch.no_grad()
def _products(work: Workload, dtype: torch.dtype) -> float:
    """Operations per second of a product of the MLP's first layer."""
    shape = work.student
    tokens, width, wide = min(work.tokens, 1024), min(shape.width, 2048), min(shape.intermediate, 2048)
    input_TD, weight_ID = torch.ones(tokens, width, dtype=dtype), torch.ones(wide, width, dtype=dtype)
    return 2.0 * tokens * width * wide / best(lambda: linear(input_TD, weight_ID))


@torch.no_grad()
def _weights_read(work: Workload, dtype: torch.dtype, rows: int) -> float:
    """Bytes of weights per second in a product of a decoding step, which has as many rows as completions run together."""
    width = min(work.student.width, 4096)
    outputs = max(1, min(_LARGEST, work.student.parameters) // width)
    input_RD, weight_OD = torch.ones(rows, width, dtype=dtype), torch.ones(outputs, width, dtype=dtype)
    return weight_OD.nbytes / best(lambda: linear(input_RD, weight_OD))


@torch.no_grad()
def _written(work: Workload) -> float:
    """Bytes per second that elementwise operations write into memory that they keep, as a layer's operations do."""
    states = torch.ones(min(_LARGEST // 4, work.tokens * work.student.width))

    def write() -> list[torch.Tensor]:
        kept = [states]
        for _ in range(4):
            kept += [silu(kept[-1]), kept[-1] * states, kept[-1] + states]
        return kept

    return 12 * states.nbytes / best(write, 3)


@torch.no_grad()
def _updated(work: Workload) -> float:
    """Bytes per second that an elementwise operation reads and writes in place, as an optimizer does."""
    weights = torch.ones(min(_LARGEST, work.trainable))
    return 2 * weights.nbytes / best(lambda: weights.mul_(1.0))


def _tiny(layers: int, vocabulary: int = 64) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", num_hidden_layers=layers, vocab_size=vocabulary, hidden_size=32, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")


def _step_seconds(engine: str, rows: int) -> list[float]:
    """Seconds of a decoding step of three tiny models: one layer, several layers, one layer and a wide vocabulary."""
    local = engine if engine in ENGINES and not engine.startswith("vllm") else "decode"
    writer = make_engine(local, _tokenizer(), [2 * _WIDE_VOCABULARY], batch_size=rows)  # it is never drawn

    def seconds_of(model: Any, steps: int) -> float:
        prompts, sampling = [[3]] * rows, Sampling(steps)
        return best(lambda: writer.generate(model, prompts, num_generations=1, sampling=sampling, seed=0), times=3)

    return [
        (seconds_of(model, _STEPS) - seconds_of(model, 2)) / (_STEPS - 2)
        for model in (_tiny(1), _tiny(_DEEP), _tiny(1, _WIDE_VOCABULARY))
    ]


def _backward_seconds(layers: int) -> float:
    """Seconds of a forward and backward pass of a tiny model on four tokens: nearly all of it starts operations."""
    model, ids = _tiny(layers), torch.tensor([[3, 4, 5, 6]])
    body = model.get_decoder()
    return best(lambda: body(input_ids=ids, use_cache=False).last_hidden_state.sum().backward())
