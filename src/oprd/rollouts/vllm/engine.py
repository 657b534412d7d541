"""Rollouts by vLLM, in the process and on the device that train: continuous batching instead of padded batches."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.vllm.weights import live_weights, refuse_what_cannot_be_synchronised
from oprd.types import Rollouts

# What a config says about anything but the computation: models that differ only here are served by the same `vllm.LLM`.
_INCIDENTAL = frozenset(
    ("_name_or_path", "transformers_version", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
)
_NO_SLEEP = (
    "rollout_engine_kwargs: sleep: true needs an accelerator whose memory vLLM can give back (CUDA, ROCm), and {}; "
    "set it to false"
)


class VLLMEngine:
    """Samples with vLLM, which starts at the first `generate` and is given the live weights before each.

    Weights go from memory to memory, adapters merged on the way; the student itself stays as it is, bit for bit. vLLM keeps
    global state, so one `vllm.LLM` runs a process: models of one architecture share it, another takes its place. Under
    `accelerate launch` each process has its own, without tensor parallelism, and keeps the first architecture.

    Run so far: vLLM 0.32 on CPU, one process and two. Not run: GPUs, and FSDP2 (where every weight is gathered in turn). Refused:
    quantised students, and architectures that transformers holds in another layout than their checkpoint (mixtures of experts).

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion; the one generated is part of it.
        batch_size: completions generated at the same time.
        dtype: dtype vLLM computes in; "auto" is that of the student's weights. For float32 weights trained under bf16 autocast
            "bfloat16" is closer to the student that is trained, and on a GPU far faster.
        gpu_memory_utilization: share of the device's memory for vLLM's copy of the weights and its keys and values.
        sleep: whether vLLM gives its device memory back after each `generate`, for the update. The next one takes it again, so the
            free memory has to be there then. Only where vLLM has sleep mode (CUDA, ROCm). Checked by call order only: no GPU yet.
        llm_kwargs: further arguments of `vllm.LLM`, which win over those given here.

    Attributes:
        log_probs: of the last `generate`, each token's log-probability under the served weights, before temperature and truncation.
        want_log_probs: whether `generate` asks for them, which costs a softmax over the vocabulary a token. A trainer sets it for
            the steps that compare them with its own.

    Raises:
        ValueError: vLLM is not installed, `batch_size` < 1, or `sleep` without an accelerator.
    """

    _running: ClassVar[Any] = None  # the process's `vllm.LLM`
    _served: ClassVar[dict[str, Any] | None] = None  # what it was started for
    _asleep: ClassVar[bool] = False  # its weights and keys and values are gone

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.3,
        sleep: bool = False,
        llm_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"generation_batch_size: {batch_size} is not allowed; at least 1")
        if sleep and not torch.accelerator.is_available():
            raise ValueError(_NO_SLEEP.format("there is none"))
        _import_vllm()
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.pad_token_id = padding_id(tokenizer, self.stop_token_ids)
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = dtype
        self.sleep = sleep
        self.log_probs: list[list[float]] = []
        self.want_log_probs = True
        self.llm_kwargs = {
            "max_num_seqs": batch_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": -1,  # as much of the model's context as memory holds
            "load_format": "dummy",
            "skip_tokenizer_init": True,  # ids in, ids out
            "generation_config": "vllm",  # nothing of the sampling defaults that come with a model
            **({"enable_sleep_mode": True} if sleep else {}),
            **(llm_kwargs or {}),
        }

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> Rollouts:
        """`num_generations` completions a prompt, prompt after prompt; a function of weights, prompts and seed.

        Each completion draws from a random stream of its own, so the function is a pure one where the kernels are deterministic.
        The global random state is left as it was.

        Raises:
            ValueError: `num_generations` < 1, a model that cannot be served, or longer sequences than memory holds.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        with _process_left_as_it_was():
            completions = self._complete(causal_lm(model), prompts, sampling, seed)
        return to_rollouts(prompts, completions, owners, self.tokenizer, self.stop_token_ids)

    def _complete(
        self, lm: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        llm = self._llm_for(lm)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        if longest > llm.model_config.max_model_len:
            raise ValueError(
                f"max_completion_length: prompt and completion may take {longest} tokens, and vLLM holds sequences of up to "
                f"{llm.model_config.max_model_len} in its share of memory or the model's context; set a smaller one"
            )
        padding = range(self.vocab_size, lm.config.get_text_config().vocab_size)
        arguments = sampling_arguments(
            sampling, seed, len(prompts), self.stop_token_ids, padding, log_probs=self.want_log_probs
        )
        parameters = [_import_vllm().SamplingParams(**own) for own in arguments]
        try:
            if VLLMEngine._asleep:  # room for the weights first: while they arrive, that of keys and values is free
                llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": live_weights(lm)})
            llm.apply_model(_refresh_head)
            if VLLMEngine._asleep:
                llm.wake_up(tags=["kv_cache"])
                VLLMEngine._asleep = False
            llm.reset_prefix_cache()  # it holds keys and values of the weights before
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
            if self.sleep:
                # Level 2 drops the weights, which are sent anew each time, and keeps the buffers, which need not be, on the host.
                VLLMEngine._asleep = True
                llm.sleep(level=2)
        except BaseException:
            VLLMEngine._served = None  # start afresh: the rest of this call must not come out of the next one
            raise
        drawn = [output.outputs[0] for output in outputs]
        self.log_probs = [
            [at[token].logprob for at, token in zip(own.logprobs, own.token_ids, strict=True)]
            for own in (drawn if self.want_log_probs else ())
        ]
        return [list(own.token_ids) for own in drawn]

    def _llm_for(self, lm: PreTrainedModel) -> Any:
        """The process's `vllm.LLM`, started anew unless it already serves this architecture with these settings."""
        if self.sleep and lm.device.type == "cpu":
            raise ValueError(_NO_SLEEP.format("the student is on the cpu"))
        config = {k: v for k, v in lm.config.to_dict().items() if k not in _INCIDENTAL}
        dtype = str(lm.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        wanted = {"config": config, "dtype": dtype, "device": lm.device, **self.llm_kwargs}
        if VLLMEngine._running is not None and VLLMEngine._served == wanted:
            return VLLMEngine._running
        refuse_what_cannot_be_synchronised(lm)
        distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if VLLMEngine._running is not None:
            if distributed:  # vLLM ends the processes' communication when it stops
                raise ValueError("rollout_engine: vllm serves one architecture only when several processes train")
            if VLLMEngine._asleep:
                VLLMEngine._running.wake_up()  # on CUDA its allocator gives back what is there, and would give back twice
            VLLMEngine._running.llm_engine.engine_core.shutdown()
            VLLMEngine._running = VLLMEngine._served = None
            VLLMEngine._asleep = False
            gc.collect()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the live weights are
        arguments = {
            "dtype": dtype,
            "enforce_eager": lm.device.type == "cpu",  # compiling takes longer there than it saves
            "distributed_executor_backend": "external_launcher" if distributed else None,
            **self.llm_kwargs,
        }
        with tempfile.TemporaryDirectory() as folder:
            lm.config.save_pretrained(folder)
            VLLMEngine._running = _import_vllm().LLM(model=folder, **arguments)
        VLLMEngine._served = wanted
        return VLLMEngine._running


def _refresh_head(vllm_model: nn.Module) -> None:
    """A tied head is not reloaded under a name of its own, and on CPU it computes from a packed copy of the weight."""
    head: Any = getattr(vllm_model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def sampling_arguments(
    sampling: Sampling,
    seed: int,
    count: int,
    stop_token_ids: Sequence[int],
    padding: Sequence[int],
    *,
    log_probs: bool = True,
) -> list[dict[str, Any]]:
    """Arguments of `vllm.SamplingParams` for `count` completions, each with a random stream of its own.

    Args:
        sampling: how completions are drawn.
        seed: all streams come from it.
        count: how many completions.
        stop_token_ids: ids that end a completion.
        padding: ids that only make the head's size round and mean no token.
        log_probs: ask for the log-probability of each token that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_tokens": sampling.max_completion_length,
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,  # these stop tokens end a completion, and none that a config names
        "detokenize": False,
        "logit_bias": dict.fromkeys(padding, -100.0) or None,  # the lowest that vLLM takes
        "logprobs": 0 if log_probs else None,  # 0: of the drawn token alone
    }
    return [{**common, "seed": own} for own in torch.randint(2**62, (count,), generator=generator).tolist()]


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read at the first import; below it a start fills a page
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"rollout_engine: vllm cannot be imported ({error}); pip install 'oprd[vllm]', or set rollout_engine: transformers"
        ) from error
    return vllm


@contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """vLLM seeds all random generators, sets environment variables and, on CPU, takes `torch.set_num_threads` away."""
    environment, python_state, numpy_state = dict(os.environ), random.getstate(), np.random.get_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        os.environ.clear()
        os.environ.update(environment)
