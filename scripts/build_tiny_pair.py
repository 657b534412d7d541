"""Build the embedded tiny pair: student and teacher are two snapshots of one supervised run on five-digit addition.

Both snapshots have one origin, so their hidden states can be compared dimension by dimension (OPRD-Vanilla).

    python scripts/build_tiny_pair.py --output src/oprd/models/assets/tiny

The same arguments give the same bytes on the same machine and library versions: one thread, fixed seeds, deterministic
algorithms. Another processor may round matrix products differently; `build.json` records the result.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from oprd.tasks.addition import ALPHABET, is_correct, problems, worked_solution

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
IGNORED_LABEL = -100
EVALUATION_SEED = 1
# The longest worked solution has 52 characters and the end token; a longer sample is wrong anyway.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of the pair, together with the library versions and the processor."""

    seed: int
    student_step: int
    teacher_step: int
    batch_size: int = 32
    peak_learning_rate: float = 1e-3
    warm_up_steps: int = 50
    final_learning_rate_share: float = 0.1
    weight_decay: float = 0.01
    gradient_clip: float = 1.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the character tokenizer: one token per character, `<unk>` for any character outside the alphabet."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # Not "." as the pattern: a dot does not match a newline, which would then join its neighbours into one token.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        # Without this the tokenizer also returns token_type_ids, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int = 4, width: int = 128, heads: int = 4
) -> LlamaForCausalLM:
    """Initialise the Llama model of the pair (4 layers, width 128 unless said otherwise) from a seed.

    Not Qwen2: for this model type `AutoTokenizer` ignores the files of the directory and builds a byte-level tokenizer from
    the vocabulary, which drops every character that this one would map to `<unk>`, and the space.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # The default 0.02 suits wider models; at width 128 it costs some hundred steps before anything is learnt.
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        # The weights are stored in float16 for size; loading with the default dtype gives float32 for the CPU.
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model


def encode_examples(tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of `n` train problems with solution and end token; only the response has labels."""
    ids_per_row, labels_per_row = [], []
    for row in problems(n, seed, "train"):
        prompt = str(row.prompt)
        prompt_ids = tokenizer.encode(prompt)
        # Tokenized apart from the prompt and without a start token, as a response is.
        solution_ids = tokenizer.encode(worked_solution(prompt), add_special_tokens=False)
        response_ids = [*solution_ids, tokenizer.eos_token_id]
        ids_per_row.append(prompt_ids + response_ids)
        labels_per_row.append([IGNORED_LABEL] * len(prompt_ids) + response_ids)
    # Padded on the right, where causal attention hides it from all real positions: no mask is needed.
    length = max(map(len, ids_per_row))
    ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids_per_row]
    labels = [row + [IGNORED_LABEL] * (length - len(row)) for row in labels_per_row]
    return torch.tensor(ids), torch.tensor(labels)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine from the peak to its final share at the teacher's step. `step` counts from 1."""
    if step <= settings.warm_up_steps:
        return settings.peak_learning_rate * step / settings.warm_up_steps
    progress = (step - settings.warm_up_steps) / max(1, settings.teacher_step - settings.warm_up_steps)
    low = settings.final_learning_rate_share
    return settings.peak_learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(settings: Settings, output: Path) -> None:
    """Run the supervised training once and write its two snapshots."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.seed)
    snapshots = {settings.student_step: output / "student", settings.teacher_step: output / "teacher"}
    train_model(model, tokenizer, settings, snapshots)


def train_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, snapshots: dict[int, Path]
) -> None:
    """Supervised training up to the teacher's step, with a snapshot written after each step of `snapshots`."""
    ids, labels = encode_examples(tokenizer, settings.teacher_step * settings.batch_size, settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    model.train()
    for step in range(1, settings.teacher_step + 1):
        rows = slice((step - 1) * settings.batch_size, step * settings.batch_size)
        logits = model(input_ids=ids[rows], use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[rows, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        if step in snapshots:
            write_snapshot(model, tokenizer, snapshots[step])


def write_snapshot(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write one model directory for the plain Auto classes: float16 weights, configurations, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    # `save_pretrained` of the model would write float32; the tied head is left out, as it does too.
    weights = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    # By default only the owner can read it; another user of an installed wheel must be able to.
    path.chmod(0o644)
    tokenizer.save_pretrained(directory)


@torch.inference_mode()
def sampled_accuracy(directory: Path, n: int, batch_size: int = 250) -> float:
    """Share of `n` test problems that the stored model solves, with one sample each at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = problems(n, EVALUATION_SEED, "test")
    torch.manual_seed(EVALUATION_SEED)
    correct = 0
    for start in range(0, n, batch_size):
        batch = rows[start : start + batch_size]
        prompts = tokenizer([str(row.prompt) for row in batch], return_tensors="pt", padding=True)
        sequences = model.generate(
            **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )
        responses = tokenizer.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(is_correct(text, str(row.answer)) for text, row in zip(responses, batch, strict=True))
    return correct / n


def describe(settings: Settings, output: Path, evaluation_problems: int) -> dict[str, object]:
    """Collect the contents of `build.json`: settings, versions, accuracies, checksums; no times, so that it does not vary."""
    models_built = {}
    for name, step in (("student", settings.student_step), ("teacher", settings.teacher_step)):
        weights = output / name / "model.safetensors"
        models_built[name] = {
            "step": step,
            "sampled_accuracy": sampled_accuracy(output / name, evaluation_problems),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
    return {
        "task": "five-digit addition, column by column",
        "settings": asdict(settings),
        "evaluation": {"problems": evaluation_problems, "seed": EVALUATION_SEED, "split": "test", "temperature": 1.0},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "models": models_built,
    }


def build_cross_teacher(
    output: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    evaluation_problems: int,
    *,
    layers: int,
    width: int,
    heads: int,
    **more: object,
) -> None:
    """Train the teacher of a cross pair from scratch, measure it, and write it with its `build.json`, which includes `more`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = build_model(tokenizer, settings.seed, layers=layers, width=width, heads=heads)
    started = time.perf_counter()
    train_model(model, tokenizer, settings, {settings.teacher_step: output})
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    description = {
        "task": "five-digit addition, column by column",
        "settings": {**asdict(settings), "layers": layers, "width": width, "heads": heads, **more},
        "evaluation": {"problems": evaluation_problems, "seed": EVALUATION_SEED, "split": "test"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sampled_accuracy": sampled_accuracy(output, evaluation_problems),
        "sha256": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(),
    }
    (output / "build.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(description, indent=2))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line; None: the arguments of the process."""
    parser = argparse.ArgumentParser(description="Build the embedded tiny pair (student and teacher).")
    parser.add_argument("--output", type=Path, required=True, help="directory that receives student/ and teacher/")
    parser.add_argument("--student-step", type=int, default=260, help="training step of the student (default 260)")
    parser.add_argument("--teacher-step", type=int, default=1000, help="training step of the teacher (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and problems (default 0)")
    parser.add_argument("--evaluation-problems", type=int, default=500, help="test problems a model (default 500)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.student_step < arguments.teacher_step:
        parser.error(
            f"--student-step is {arguments.student_step}, --teacher-step is {arguments.teacher_step}: "
            "the student must be an earlier step of the run, 1 or later"
        )
    if arguments.evaluation_problems < 1:
        parser.error(f"--evaluation-problems is {arguments.evaluation_problems}: it must be 1 or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Build the pair, measure it, and print both accuracies."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    settings = Settings(arguments.seed, arguments.student_step, arguments.teacher_step)
    started = time.perf_counter()
    train(settings, arguments.output)
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    description = describe(settings, arguments.output, arguments.evaluation_problems)
    (arguments.output / "build.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(description["models"], indent=2))


if __name__ == "__main__":
    main()
