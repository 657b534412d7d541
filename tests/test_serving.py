"""A run's `model/` is served as it is: cache on, generation config and chat template of the student; documented ways run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import oprd
from tiny import tiny_model, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
GENERATION = {
    "temperature": 0.6,
    "top_p": 0.95,
    "do_sample": True,
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "pad_token_id": 0,
}
RUN = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model = tiny_model(seed=3)
    model.generation_config = GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


def train(folder, student, **more) -> None:
    args = oprd.OPRDConfig(str(folder), **RUN, save_strategy="steps", save_steps=1)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("1+1=", "2+2=")]
    oprd.OPRDTrainer(
        str(student), more.pop("teacher", tiny_model(seed=4)), args=args, train_dataset=rows, **more
    ).train(outputs=True)


def python_blocks() -> list[str]:
    section = PAGE.read_text().partition("## Serve the trained model")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_a_saved_model_generates_with_a_cache_and_the_settings_of_its_student(student, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "mine"
    train(run, student)
    for saved in (run / "model", run / "checkpoint-1"):
        assert json.loads((saved / "config.json").read_text())["use_cache"] is True
        found = json.loads((saved / "generation_config.json").read_text())
        assert {key: found[key] for key in GENERATION} == GENERATION
        assert (saved / "chat_template.jinja").read_text() == (student / "chat_template.jinja").read_text()
    monkeypatch.chdir(tmp_path)
    (serve,) = [block for block in python_blocks() if "pipeline" in block]
    exec(serve, {})
    assert "6" in capsys.readouterr().out


def test_an_adapter_is_merged_as_the_page_says(student, tmp_path, monkeypatch):
    from peft import LoraConfig

    run = tmp_path / "runs" / "mine"
    train(run, student, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), teacher=tiny_model(seed=4))
    monkeypatch.chdir(tmp_path)
    (merge,) = [block for block in python_blocks() if "merge_and_unload" in block]
    exec(merge, {})
    merged, served = run / "merged", AutoModelForCausalLM.from_pretrained(run / "merged")
    from peft import AutoPeftModelForCausalLM

    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        ours = AutoPeftModelForCausalLM.from_pretrained(run / "model").eval()(ids).logits
        assert torch.allclose(served.eval()(ids).logits, ours, atol=1e-5)
    assert json.loads((merged / "config.json").read_text())["use_cache"] is True
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(student).chat_template
