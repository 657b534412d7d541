"""Rollouts by vLLM, in the process and on the device that train: continuous batching, several times faster than `generate`."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from oprd.models import causal_lm
from oprd.rollout.base import Sampling
from oprd.types import FinishReason, Rollouts

# What a config says about anything but the computation; models that differ only here share an engine.
_INCIDENTAL = frozenset(
    ("_name_or_path", "transformers_version", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
)


class VLLMEngine:
    """Samples with vLLM, which starts at the first `generate` and is given the live weights before each.

    Weights go from memory to memory, adapters merged; the student itself is not touched, bit for bit. One engine runs at a
    time: a model of another architecture or dtype (a teacher being evaluated, say) takes its place, models of the same one
    share it. Under `accelerate launch` each process has an engine of its own, with no tensor parallelism.

    Tried on CPU (vLLM 0.32), alone and as two processes. Not yet run: GPUs, FSDP2 (weights are gathered one by one). Refused:
    quantised students, and architectures that transformers keeps in another layout than their checkpoint (mixtures of experts).

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion; the one generated is part of it.
        batch_size: completions generated at the same time.
        dtype: dtype vLLM computes in; "auto" is the student's own. With float32 weights trained under bf16 autocast,
            "bfloat16" is closer to what is trained, and on a GPU far faster.
        gpu_memory_utilization: share of the device's memory for vLLM's copy of the weights and its cache of keys and values.
        llm_kwargs: further arguments of `vllm.LLM`; they win over those set here.

    Raises:
        ValueError: vLLM is not installed, or `batch_size` < 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.3,
        llm_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"generation_batch_size: {batch_size} is not allowed; at least 1")
        _import_vllm()
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.batch_size = batch_size
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_token_ids[0]
        self.dtype = dtype
        self.gpu_memory_utilization = gpu_memory_utilization
        self.llm_kwargs = dict(llm_kwargs or {})
        self._llm: Any | None = None
        self._serves: tuple[str, dict[str, Any]] | None = None

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

        Every completion has a random stream of its own, so it is a pure one as far as the kernels are deterministic. The global
        random state is left as it was.

        Raises:
            ValueError: `num_generations` < 1, a model vLLM cannot serve, or more tokens than its memory holds.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations: {num_generations} is not allowed; at least 1")
        row_names = rows if rows is not None else range(len(prompt_ids))
        prompts = [list(prompt) for prompt in prompt_ids for _ in range(num_generations)]
        owners = [row for row in row_names for _ in range(num_generations)]
        with _process_left_as_it_was():
            completions = self._complete(causal_lm(model), prompts, sampling, seed)
        reasons: list[FinishReason] = ["stop" if c[-1] in self.stop_token_ids else "length" for c in completions]
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return Rollouts(prompts, completions, reasons, texts, owners)

    def _complete(
        self, lm: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        llm = self._engine_for(lm)
        longest = max((len(p) for p in prompts), default=0) + sampling.max_completion_length
        if longest > llm.model_config.max_model_len:
            raise ValueError(
                f"max_completion_length: prompt and completion may need {longest} tokens, and vLLM's memory holds "
                f"{llm.model_config.max_model_len} of a sequence; lower it or raise gpu_memory_utilization"
            )
        seeds = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(seed)).tolist()
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": live_weights(lm)})
            llm.apply_model(_refresh_head)
            llm.reset_prefix_cache()  # keys and values of the weights before
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._sampling_params(sampling, s) for s in seeds],
                use_tqdm=False,
            )
        except BaseException:
            self._stop()  # what an interrupted call left in the queue must not come out of the next one
            raise
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _sampling_params(self, sampling: Sampling, seed: int) -> Any:
        return _import_vllm().SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_completion_length,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=True,  # the stop tokens are those above, whatever the model's configs say
            detokenize=False,
            seed=seed,
        )

    def _engine_for(self, lm: PreTrainedModel) -> Any:
        dtype = str(lm.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        serves = dtype, {k: v for k, v in lm.config.to_dict().items() if k not in _INCIDENTAL}
        if serves != self._serves:
            self._stop()
            self._llm, self._serves = self._start(lm, dtype), serves
        return self._llm

    def _start(self, lm: PreTrainedModel, dtype: str) -> Any:
        _refuse_other_layouts(lm)
        several_processes = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        arguments = {
            "dtype": dtype,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": -1,  # as much of the model's context as fits
            "max_num_seqs": self.batch_size,
            "enforce_eager": lm.device.type == "cpu",  # compiling takes longer there than it saves
            "distributed_executor_backend": "external_launcher" if several_processes else None,
            **self.llm_kwargs,
        }
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the live weights are
        with tempfile.TemporaryDirectory() as folder:
            lm.config.save_pretrained(folder)
            return _import_vllm().LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,  # ids in, ids out
                generation_config="vllm",  # nothing of the model's own sampling defaults
                **arguments,
            )

    def _stop(self) -> None:
        self._llm = self._serves = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _refresh_head(vllm_model: nn.Module) -> None:
    """A tied head is not reloaded by its own name, and on CPU it computes from a packed copy."""
    head: Any = getattr(vllm_model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def live_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model under the name it has in a checkpoint, adapters merged. The model is left as it is, bit for bit."""
    seen: set[int] = set()
    for name, tensor in _weights_of(lm, ""):
        if id(tensor) not in seen:  # a tied weight is in a checkpoint once
            seen.add(id(tensor))
            data = tensor.detach()
            yield name, data.full_tensor() if hasattr(data, "full_tensor") else data


def _weights_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if hasattr(module, "get_base_layer"):  # a PEFT adapter around a layer
        yield from ((prefix + name, tensor) for name, tensor in _merged(module).items())
        return
    if hasattr(module, "modules_to_save"):  # a layer that PEFT trains a whole copy of
        copies: Any = module.modules_to_save
        module = module.original_module if module.disable_adapters else copies[module.active_adapters[0]]  # type: ignore
    own = {
        **module._parameters,
        **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set},
    }
    yield from ((prefix + name, tensor) for name, tensor in own.items() if tensor is not None)
    for name, child in module.named_children():
        yield from _weights_of(child, f"{prefix}{name}.")


@torch.no_grad()
def _merged(layer: Any) -> dict[str, Tensor]:
    """The weights of a PEFT layer with its adapters merged in: the plain layer's own when they are off or merged already."""
    plain = layer.get_base_layer()
    if layer.disable_adapters or layer.merged:
        return dict(plain.named_parameters())
    saved = {name: parameter.data for name, parameter in plain.named_parameters()}
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()  # merging and unmerging rounds; it happens to a copy
    try:
        layer.merge()
        merged = {name: parameter.data.clone() for name, parameter in plain.named_parameters()}
        layer.unmerge()
    finally:
        for name, parameter in plain.named_parameters():
            parameter.data = saved[name]
    return merged


def _refuse_other_layouts(lm: PreTrainedModel) -> None:
    if getattr(lm, "hf_quantizer", None) is not None:
        raise ValueError("rollout_engine: vllm does not take quantised students; set rollout_engine: transformers")
    names = {name: tensor.detach().to("meta") for name, tensor in lm.state_dict().items()}
    if set(revert_weight_conversion(lm, names)) != set(names):
        raise ValueError(
            f"rollout_engine: vllm is not supported for {type(lm).__name__}, whose weights lie in memory in another layout than in "
            "its checkpoint; set rollout_engine: transformers"
        )


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read at the first import; below it comes a page a start
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
