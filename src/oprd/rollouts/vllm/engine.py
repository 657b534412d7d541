"""Samples with vLLM in the training process, on the training device: continuous batching instead of padded batches."""

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
from oprd.models.fingerprint import LOADING
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.vllm.weights import check_servable, live_weights

# Config fields without effect on the computation: models that differ only in these share one `vllm.LLM`.
_INCIDENTAL = LOADING | {"bos_token_id", "eos_token_id", "pad_token_id"}
_NO_SLEEP = (
    "rollout_engine_kwargs: sleep: true needs an accelerator whose memory vLLM can release (CUDA, ROCm), and {}; "
    "set it to false"
)


class VLLMEngine:
    """Samples with vLLM, which starts at the first `generate` and receives the student's weights before each.

    Weights are copied from memory to memory, with adapters merged; the student's own weights keep every bit. vLLM has global
    state, so a process runs one `vllm.LLM`: models of one architecture share it, and another architecture replaces it. Under
    `accelerate launch` each process has its own, without tensor parallelism, and keeps its first architecture.

    Tested with vLLM 0.32 on CPU, with one process and with two. Not tested: GPUs, and FSDP2 (which gathers weight by weight).
    Refused: quantised students, and architectures that transformers holds in another layout than their checkpoint (mixtures of
    experts).

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion, which includes the one that was drawn.
        batch_size: completions generated at the same time.
        dtype: dtype in which vLLM computes; "auto" is that of the student's weights. For float32 weights trained under bf16
            autocast, "bfloat16" is closer to the trained student, and on a GPU far faster.
        gpu_memory_utilization: share of the device's memory for vLLM's weights, keys and values.
        sleep: whether vLLM releases its device memory after each `generate`, for the update. The next `generate` allocates it
            again. Needs vLLM's sleep mode (CUDA, ROCm). Tests check the order of calls only; not tested on a GPU.
        llm_kwargs: further arguments of `vllm.LLM`, which override those set here.

    Attributes:
        running: the process's `vllm.LLM`, shared by all engines; None before the first `generate`.

    Raises:
        ValueError: vLLM is not installed, `batch_size` < 1, or `sleep` without an accelerator.
    """

    can = EngineAbilities(
        log_probs=True
    )  # not in the background: it runs on the training device and changes global state
    running: ClassVar[Any] = None
    _served: ClassVar[dict[str, Any] | None] = None  # configuration that `running` was started with
    _asleep: ClassVar[bool] = False  # `running` has released its weights, keys and values

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
        self.llm_kwargs = {
            "max_num_seqs": batch_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": -1,  # as much of the model's context as fits in memory
            "load_format": "dummy",
            "skip_tokenizer_init": True,  # input and output are token ids
            "generation_config": "vllm",  # ignore the sampling defaults of the checkpoint
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
        want_log_probs: bool = False,
    ) -> Sampled:
        """Sample as `RolloutEngine.generate` says.

        Each completion has its own random stream, so the result depends on weights, prompts and seed alone where the kernels are
        deterministic. The global random state is restored. Log-probabilities cost a softmax over the vocabulary a token.

        Raises:
            ValueError: `num_generations` < 1, a model that vLLM cannot serve, or longer sequences than fit in memory.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        device = next(model.parameters()).device.type
        with _process_state_restored(), torch.autocast(device, enabled=False):  # its weights have a dtype of their own
            outputs = self._complete(causal_lm(model), prompts, sampling, seed, want_log_probs)
        completions = [list(output.token_ids) for output in outputs]
        log_probs = [
            [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in (outputs if want_log_probs else ())
        ]
        rollouts = to_rollouts(prompts, completions, owners, self.tokenizer, self.stop_token_ids)
        return Sampled(rollouts, log_probs if want_log_probs else None)

    def _complete(
        self, lm: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, seed: int, want_log_probs: bool
    ) -> list[Any]:
        """vLLM's `CompletionOutput` of each prompt, drawn with the weights that `lm` has now."""
        llm = self._llm_for(lm)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        if longest > llm.model_config.max_model_len:
            raise ValueError(
                f"max_completion_length: prompt and completion may take {longest} tokens, and vLLM takes sequences of up to "
                f"{llm.model_config.max_model_len} (its memory, or the model's context); set a smaller one"
            )
        padding = range(self.vocab_size, lm.config.get_text_config().vocab_size)
        arguments = sampling_arguments(
            sampling, seed, len(prompts), self.stop_token_ids, padding, log_probs=want_log_probs
        )
        parameters = [_import_vllm().SamplingParams(**own) for own in arguments]
        try:
            if VLLMEngine._asleep:  # allocate the weights first: while they load, the memory of keys and values is free
                llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": live_weights(lm)})
            llm.apply_model(_refresh_head)
            if VLLMEngine._asleep:
                llm.wake_up(tags=["kv_cache"])
                VLLMEngine._asleep = False
            llm.reset_prefix_cache()  # its keys and values come from earlier weights
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
            if self.sleep:
                # Level 2 drops the weights, which are sent again anyway, and keeps the buffers on the host.
                VLLMEngine._asleep = True
                llm.sleep(level=2)
        except BaseException:
            VLLMEngine._served = None  # restart vLLM: its next call would return the rest of this one
            raise
        return [output.outputs[0] for output in outputs]

    def _llm_for(self, lm: PreTrainedModel) -> Any:
        """The process's `vllm.LLM`, restarted unless it serves this architecture with these settings."""
        if self.sleep and lm.device.type == "cpu":
            raise ValueError(_NO_SLEEP.format("the student is on the cpu"))
        config = {k: v for k, v in lm.config.to_dict().items() if k not in _INCIDENTAL}
        dtype = str(lm.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        wanted = {"config": config, "dtype": dtype, "device": lm.device, **self.llm_kwargs}
        if VLLMEngine.running is not None and VLLMEngine._served == wanted:
            return VLLMEngine.running
        check_servable(lm)
        distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if VLLMEngine.running is not None:
            if distributed:  # stopping vLLM destroys the process group
                raise ValueError(
                    "rollout_engine: vllm serves one architecture only when several processes train; "
                    "set rollout_engine: transformers"
                )
            if VLLMEngine._asleep:
                VLLMEngine.running.wake_up()  # else its CUDA allocator would free the released memory a second time
            VLLMEngine.running.llm_engine.engine_core.shutdown()
            VLLMEngine.running = VLLMEngine._served = None
            VLLMEngine._asleep = False
            gc.collect()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run in this process, which has the live weights
        arguments = {
            "dtype": dtype,
            "enforce_eager": lm.device.type == "cpu",  # on a CPU, compiling takes longer than it saves
            "distributed_executor_backend": "external_launcher" if distributed else None,
            **self.llm_kwargs,
        }
        with tempfile.TemporaryDirectory() as folder:
            lm.config.save_pretrained(folder)
            VLLMEngine.running = _import_vllm().LLM(model=folder, **arguments)
        VLLMEngine._served = wanted
        return VLLMEngine.running


def _refresh_head(vllm_model: nn.Module) -> None:
    """Repack the LM head: on CPU it computes from a packed copy, which reloading a tied weight does not update."""
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
    """Arguments of `vllm.SamplingParams` for `count` completions, each with its own seed.

    Args:
        sampling: how completions are drawn.
        seed: all completions' seeds are drawn from it.
        count: number of completions.
        stop_token_ids: ids that end a completion.
        padding: ids of rows of the head beyond the vocabulary, which are never drawn.
        log_probs: request the log-probability of each drawn token.
    """
    generator = torch.Generator().manual_seed(seed)
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_completion_length,
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,  # only `stop_token_ids` end a completion, not the model's config
        "detokenize": False,
        "logit_bias": dict.fromkeys(padding, -100.0) or None,  # the lowest value that vLLM accepts
        "logprobs": 0 if log_probs else None,  # 0: only the drawn token
    }
    return [{**common, "seed": own} for own in torch.randint(2**62, (count,), generator=generator).tolist()]


def _import_vllm() -> Any:
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "ERROR"
    )  # read at the first import; lower levels print a page at each start
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"rollout_engine: vllm cannot be imported ({error}); pip install 'oprd[vllm]', or set rollout_engine: transformers"
        ) from error
    return vllm


@contextmanager
def _process_state_restored() -> Iterator[None]:
    """Restore what vLLM changes: random generators, environment variables and, on CPU, `torch.set_num_threads`."""
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
