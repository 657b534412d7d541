"""The doctor's formulas against real models, closed forms, and its document against what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from oprd.cli import app
from oprd.models.architecture import freeze_above
from oprd.run_config import RunConfig
from oprd.tools.doctor.advice import advise
from oprd.tools.doctor.document import MARGIN, errors, render
from oprd.tools.doctor.memory import predict_memory, saved_bytes
from oprd.tools.doctor.probe import probe_cpu
from oprd.tools.doctor.shape import KNOWN, known_shape, shape_of
from oprd.tools.doctor.show import examine, lines_of
from oprd.tools.doctor.time import Device, predict_seconds
from oprd.tools.doctor.workload import Lora, Workload, workload_of
from tiny import tiny_model

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))


def work(**changes) -> Workload:
    shape = shape_of(tiny_model("llama").config)
    return Workload(**{"student": shape, "teacher": shape, "layers": (1, 2, 3), "rollouts": 4, "prompt": 3, "completion": 6,
                       "positions": 6, "compared": 6, "accelerator": False, **changes})  # fmt: skip


def saved_by_autograd(model, ids, mask, bf16) -> int:
    """Bytes of what a forward pass keeps for backward, parameters apart, each storage once."""
    storages = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            kept[storage._cdata] = (tensor, storage.nbytes())  # the tensor too, lest its place be used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize(
    ("padded", "bf16", "lora", "dtype"),
    [(False, False, None, "float32"), (True, False, None, "float32"), (False, True, None, "float32"),
     (True, True, None, "float32"), (False, False, ("q_proj", "v_proj"), "float32"),
     (True, False, ("o_proj", "up_proj", "down_proj"), "float32"), (False, False, None, "bfloat16"),
     (True, True, None, "bfloat16"), (False, False, ("o_proj", "up_proj", "down_proj"), "bfloat16"),
     (True, True, ("q_proj", "v_proj"), "bfloat16")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_a_block_keeps_for_backward(family, attention, padded, bf16, lora, dtype):
    """Exactly: the difference of five and four blocks, so that embedding and final norm do not count."""
    sizes = []
    ids = torch.randint(3, 64, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 1 - padded
    for layers in (4, 5):
        model = tiny_model(family, num_hidden_layers=layers, dtype=getattr(torch, dtype)).train()
        model.set_attn_implementation(attention)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=4, target_modules=list(lora))).base_model.model
        sizes.append(saved_by_autograd(model, ids, mask, bf16))
    shape = shape_of(tiny_model(family).config)
    adapter = Lora(4, lora) if lora else None
    size = getattr(torch, dtype).itemsize
    eager = attention == "eager"
    found = work(student=shape, padded=padded, bf16=bf16, lora=adapter, student_bytes=size, eager=eager)
    a_token, copies = saved_bytes(found)
    assert sizes[1] - sizes[0] == 16 * a_token + copies


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layers", "kind"), [((3,), None), ((1, 2), None), ((2,), "reverse_kl")])
def test_parameters_are_those_of_the_model(tied, layers, kind):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    shape = shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    freeze_above(model, 3 if kind else layers[-1], head=kind is not None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = work(student=shape, layers=layers, output_space=kind)
    assert found.trainable == trained
    parts = predict_memory(found).parts
    assert parts["student weights"] == 4 * shape.parameters
    assert parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained


def test_an_adapter_trains_itself_alone_and_needs_no_second_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    found = work(teacher=None, lora=Lora(4, ("q_proj", "down_proj")))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predict_memory(found).parts["teacher weights"] == 0


@pytest.mark.parametrize(("size", "billions"), [("1.5B", 1.54), ("7B", 7.62), ("32B", 32.8), ("70B", 70.6)])
def test_the_well_known_sizes(size, billions):
    """As their model cards say."""
    assert known_shape(size).parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert set(KNOWN) == {"1.5B", "7B", "32B", "70B"}


def test_the_parts_in_closed_form():
    """llama of 3 layers, D = 32, |V| = 64, 4 heads and 2 for keys of 8 channels; 4 rollouts of 8 tokens read."""
    found = predict_memory(work(output_space="reverse_kl", teacher_bytes=2, generation_batch=3)).parts
    assert found["state cache"] == 2 * 4 * 6 * 32 * (3 + 1)  # three layers, and what the head reads
    assert (
        found["vocabulary chunks"] == 4 * 3 * 4 * 6 * 64 + 4 * 64 * 32
    )  # three buffers of all 24 positions; its gradient
    assert found["rollout KV cache"] == 3 * 9 * (3 + 1) * 16 * 8
    plain = predict_memory(work()).parts
    assert plain["vocabulary chunks"] == 0
    assert predict_memory(work(bridge_rank=5)).parts["state cache"] == 4 * 4 * 6 * 3 * 5


def test_attention_rows_are_kept_of_the_teacher_and_of_the_student():
    """4 rollouts of 6 positions that look at 8 tokens, 4 heads, 2 layers."""
    alone, beside = predict_memory(work(eager=True)), predict_memory(work(eager=True, attention_layers=2))
    rows = 2 * 4 * 6 * 4 * 8
    assert beside.parts["state cache"] == alone.parts["state cache"] + 4 * rows
    assert beside.phases["update"] >= alone.phases["update"] + 2 * 4 * rows
    assert alone.parts["activations"] > predict_memory(work()).parts["activations"]


def test_sampling_during_the_update_holds_a_copy_and_the_cache_all_the_time():
    alone, overlapped = predict_memory(work()), predict_memory(work(overlap=True))
    copy = 4 * work().trainable
    assert overlapped.parts == {**alone.parts, "copy that samples": copy}
    assert overlapped.phases["rollout"] == alone.phases["rollout"] + copy
    sampling = 3 * 4 * 4 * work().student.rows  # three float32 [4 rollouts, vocabulary]
    for phase in ("teacher", "update", "optimizer"):
        beside = copy + alone.parts["rollout KV cache"] + sampling
        assert overlapped.phases[phase] == pytest.approx(alone.phases[phase] + beside)


def test_chunks_do_not_grow_with_the_tokens():
    few, many = (
        work(student=known_shape("1.5B"), output_space="jsd", completion=n, accelerator=True) for n in (2048, 8192)
    )
    assert predict_memory(few).parts["vocabulary chunks"] == predict_memory(many).parts["vocabulary chunks"]


def test_devices():
    one, split, copies = (work(devices=d, sharding=s) for d, s in ((1, "none"), (4, "fsdp"), (4, "ddp")))
    whole, part, copy = (predict_memory(w).parts for w in (one, split, copies))
    for name in ("student weights", "gradients", "optimizer", "teacher weights"):
        assert part[name] == whole[name] / 4
    assert copy["gradients"] == 2 * whole["gradients"]  # DDP's buckets
    assert part["activations"] == copy["activations"] == whole["activations"]
    with pytest.raises(ValueError, match="--devices: 2 with --sharding none"):
        work(devices=2)
    with pytest.raises(ValueError, match="--sharding: 'zero' is not one of none, ddp, fsdp"):
        work(sharding="zero")


def test_advice_is_what_the_change_gives():
    long = work(rollouts=8, completion=500, positions=500)
    found = {a.setting: a.peak for a in advise(long)}
    assert found["activation_checkpointing: true"] == predict_memory(replace(long, checkpointing=True)).peak
    half = next(s for s in found if s.startswith("micro_batch_tokens"))
    assert half == f"micro_batch_tokens: {4 * 502}"
    assert all(peak < predict_memory(long).peak for peak in found.values())
    assert predict_memory(long).peak_phase == "update"


def test_time_in_closed_form():
    """A device that reads slowly is bound by the weights: once a token of each batch that is generated together."""
    slow = Device(1e12, 1.0, 1.0, 1.0)
    seconds = predict_seconds(work(generation_batch=2), slow)
    shape = work().student
    cache = 2 * (3 + 6 / 2) * 3 * 2 * 16 * 4
    assert seconds["rollout"] == pytest.approx(2 * 6 * (4 * shape.parameters + cache) / 1e9)
    flops = predict_seconds(work(), Device(1.0, 1e30, 0.5, 1.0))
    a_pass = 3 * 32 * (2 * shape.linear_parameters + 4 * 32 * 4) / 0.5e12
    assert flops["teacher"] == pytest.approx(a_pass)
    assert flops["update"] == pytest.approx(3 * a_pass)
    with_head = predict_seconds(work(output_space="reverse_kl"), Device(1.0, 1e30, 0.5, 1.0))
    assert with_head["update"] - flops["update"] == pytest.approx(4 * 2 * 64 * 32 * 24 / 0.5e12)


def test_what_a_cpu_adds_in_closed_form():
    """Two batches of two rows; 6 tokens each; 3 layers; a block writes 10·32 + 6·(32 + 16) + 16 + 2·32 + 4·48 numbers a token."""
    free = Device(1e30, 1e30, 1.0, 1.0)
    asked = work(generation_batch=2)
    assert sum(predict_seconds(asked, free).values()) < 1e-12

    def of(**figure: float) -> dict[str, float]:
        return predict_seconds(asked, replace(free, **figure))

    steps = 2 * 6
    assert of(layer_seconds=1.0)["rollout"] == pytest.approx(steps * 3)
    assert of(step_seconds=1.0)["rollout"] == pytest.approx(steps)
    assert of(logit_seconds=1.0)["rollout"] == pytest.approx(steps * 2 * 64)
    started = of(block_seconds=3.0)
    assert (started["teacher"], started["update"]) == (pytest.approx(3 * 1.0), pytest.approx(3 * 3.0))
    block = 320 + 288 + 16 + 64 + 192
    written = of(written=4e-9)  # one number a second
    assert written["teacher"] == pytest.approx(3 * 32 * block)
    assert written["update"] == pytest.approx(3 * written["teacher"] + asked.trainable)
    cache = 2 * (3 + 6 / 2) * 3 * 2 * 16
    assert written["rollout"] == pytest.approx(2 * 3 * (2 * 3) * block + steps * (cache + 2 * 3 * block))
    assert of(updated=4e-9)["optimizer"] == pytest.approx(10 * asked.trainable)
    cast = predict_seconds(replace(asked, bf16=True), replace(free, written=4e-9))
    assert cast["rollout"] - written["rollout"] == pytest.approx(steps * asked.student.parameters)
    assert cast["update"] - written["update"] == pytest.approx(asked.student.parameters)


def test_the_probe_measures_and_leaves_nothing_behind():
    asked = work()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    device = probe_cpu(asked, "vllm")  # needs another process: the default's steps are measured
    figures = (device.tflops, device.bandwidth, device.written, device.updated, device.step_seconds)
    assert all(0 < figure < float("inf") for figure in figures)
    assert device.threads == threads == torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), state)
    seconds = predict_seconds(asked, device)
    assert all(0 < value < 60 for value in seconds.values())


def test_a_gpus_figures_are_never_measured(monkeypatch):
    """A matrix product that takes a second would show in any probe; the data sheet's figures stay as they are."""
    slow = {"calls": 0}

    def counted(*args, **kwargs):
        slow["calls"] += 1
        raise AssertionError("a probe has run")

    monkeypatch.setattr("oprd.tools.doctor.probe.probe_cpu", counted)
    runner = CliRunner()
    result = runner.invoke(app, ["doctor", "--config", "tiny", "--use_cpu", "false"])
    assert result.exit_code == 0, result.output
    assert "at 989 TFLOPS x 40% and 3350 GB/s x 60%" in result.output
    given = ["--cpu", "--device-tflops", "0.05", "--device-bandwidth", "9"]
    result = runner.invoke(app, ["doctor", "--config", "tiny", *given])
    assert result.exit_code == 0, result.output
    assert "at 0.05 TFLOPS x 100% and 9 GB/s x 100%" in result.output
    assert slow["calls"] == 0


def test_half_a_description_of_a_cpu_is_refused():
    wrong = CliRunner().invoke(app, ["doctor", "--config", "tiny", "--device-bandwidth", "9"])
    assert str(wrong.exception) == (
        "--device-bandwidth: 9.0 alone does not describe a CPU; give --device-tflops too, or neither to measure this one"
    )


def test_a_recipe_becomes_a_workload(tmp_path):
    run = RunConfig.load("tiny", {"output_dir": str(tmp_path), "micro_batch_tokens": 1000})
    found = workload_of(run, prompt=12)
    assert (found.rollouts, found.completion, found.length, found.rows) == (32, 64, 75, 13)
    assert found.micro_batches == 3
    assert found.layers == tuple(range(1, found.student.layers + 1))
    assert found.diagnostics
    assert found.output_space is None
    assert not found.checkpointing
    at_budget, above = (
        workload_of(RunConfig.load("tiny", {"output_dir": str(tmp_path), "micro_batch_tokens": tokens}), prompt=12)
        for tokens in (75, 74)
    )
    assert (at_budget.checkpointing, above.checkpointing) == (False, True)  # as `LongSequences` does


@pytest.mark.parametrize(
    ("kwargs", "student", "teacher"),
    [({}, 4, 4), ({"model_init_kwargs": {"dtype": "bfloat16"}}, 2, 4),
     ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, 4, 2), ({"model_init_kwargs": {"dtype": "auto"}}, 4, 4),
     ({"model_init_kwargs": {"dtype": "bfloat16"}, "teacher_model": None, "lora": {"r": 4}}, 2, 2)],
    ids=str,
)  # fmt: skip
def test_the_dtype_of_the_weights_is_that_of_the_arguments_of_from_pretrained(tmp_path, kwargs, student, teacher):
    run = RunConfig.load("tiny", {"output_dir": str(tmp_path), **kwargs})
    found = workload_of(run)
    assert (found.student_bytes, found.teacher_bytes) == (student, teacher)
    memory = predict_memory(found)
    adapter = found.trainable if "lora" in kwargs else 0
    assert memory.parts["student weights"] == student * found.student.parameters + 4 * adapter
    assert memory.parts["gradients"] == (4 if adapter else student) * found.trainable
    assert memory.parts["teacher weights"] == (0 if found.teacher is None else teacher * found.teacher.parameters)


def test_other_arguments_of_from_pretrained_change_the_shape(tmp_path):
    cut = {"num_hidden_layers": 2, "tie_word_embeddings": False, "dtype": "bfloat16"}
    both = {"model_init_kwargs": cut, "teacher_model_init_kwargs": cut}
    found = workload_of(RunConfig.load("tiny", {"output_dir": str(tmp_path), **both}))
    for shape in (found.student, found.teacher):
        assert (shape.layers, shape.tied) == (2, False)


def test_every_teacher_is_counted_once_or_one_at_a_time_where_they_are_offloaded(tmp_path):
    teachers = {
        "math": "embedded:tiny/teacher", "code": {"model": "embedded:tiny/teacher"},
        "prose": {"model": "embedded:tiny/student", "init_kwargs": {"dtype": "bfloat16"}},
    }  # fmt: skip
    several = {"teachers": teachers, "teacher_model": None, "output_dir": str(tmp_path)}
    found = workload_of(RunConfig.load("tiny", several))
    size = found.student.parameters
    assert found.several == {"math": 4 * size, "code": 0, "prose": 2 * size}
    assert predict_memory(found).parts["teacher weights"] == 6 * size
    assert "offload_teachers: true" in [advice.setting for advice in advise(found, least=0)]
    offloaded = workload_of(RunConfig.load("tiny", {**several, "offload_teachers": True}))
    assert predict_memory(offloaded).parts["teacher weights"] == 4 * size
    lines = "\n".join(lines_of(examine(offloaded, Device()), ()))
    assert "weights of the teachers (each in host memory until it is used; offload_teachers: true)" in lines
    assert "shared with one above" in lines


@pytest.mark.parametrize(
    ("keys", "copies"), [({}, 1), ({"lora": {"r": 4}}, 0), ({"lora": {"r": 4}, "teacher_update_rate": 0.1}, 1)]
)
def test_a_student_that_is_its_own_teacher_is_copied_unless_its_adapter_can_be_turned_off(tmp_path, keys, copies):
    own = {"teacher_model": "student", "teacher_prompt": "{prompt}{answer}", "output_dir": str(tmp_path)}
    found = workload_of(RunConfig.load("tiny", {**own, **keys}))
    assert predict_memory(found).parts["teacher weights"] == copies * 4 * found.student.parameters


def test_a_teacher_beside_fixed_responses_is_loaded_here_and_counted(tmp_path):
    named = {"output_dir": str(tmp_path), "lmbda": 0.0, "eval_teacher": False}
    plain, beside = (
        workload_of(RunConfig.load("tiny", {**named, "teacher_model": teacher}))
        for teacher in ("embedded:wider/teacher", {"model": "embedded:wider/teacher", "responses": "r.jsonl"})
    )
    assert beside == plain
    with pytest.raises(ValueError, match="this teacher has none here"):
        workload_of(RunConfig.load("tiny", {**named, "teacher_model": {"cache": "folder"}}))


def test_other_blocks_are_refused():
    with pytest.raises(ValueError, match="are for blocks with q_proj"):
        shape_of(tiny_model("phi").config)


def test_the_command(tmp_path):
    file = tmp_path / "doctor.json"
    result = CliRunner().invoke(
        app, ["doctor", "--config", "tiny", "--json", str(file), "--num_generations", "2", "--prompt-length", "9"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["assumed"]["rollouts"] == 64
    assert found["peak"] == max(found["phases"].values())
    assert "computed, not measured" in result.output
    assert found["this_machine"]["threads"] == torch.get_num_threads()
    assert f"this machine, {torch.get_num_threads()} thread(s): " in result.output
    assert "GFLOP/s float32" in result.output
    wrong = CliRunner().invoke(app, ["doctor", "--config", "tiny", "--dtype", "int8"])
    assert "--dtype: 'int8' is not one of float32, bfloat16" in str(wrong.exception)


# Of the model cards: parameters, layers, width, channels of the keys, rows of an untied head.
CARDS = {
    "1.5B": (1_543_714_304, 28, 1536, 256, 0), "7B": (7_615_616_512, 28, 3584, 512, 152_064),
    "32B": (32_763_876_352, 64, 5120, 1024, 152_064), "70B": (70_553_706_496, 80, 8192, 1024, 128_256),
}  # fmt: skip


def test_the_documents_well_known_sizes_by_hand():
    """Six rollouts of 2560 tokens a micro-batch; what is split among devices is weights, gradients, moments and teacher."""
    import doctor

    rows = [line.strip("| ").split(" | ") for line in doctor.DOCUMENT.read_text().splitlines() if "(update)" in line]
    assert [tuple(row[:2]) for row in rows] == [(size, n) for size in CARDS for n in ("1", "8", "64")]
    tokens = 6 * 2560
    for size, devices, *cells, peak, fits in rows:
        parameters, layers, width, keys, untied = CARDS[size]
        trained = parameters - untied * width  # all but the head, which no term reads
        expected = [
            4 * parameters / int(devices),
            (4 + 8) * trained / int(devices),
            2 * parameters / int(devices),
            4 * tokens * (width * (layers + 3) + 2 * 128),  # a state a block, what the final norm keeps, the rotation
            2 * 6 * 2048 * width * layers,
            16 * 2560 * (layers + 1) * keys * (4 + 2),  # keys in float32, values in bfloat16
        ]
        assert [float(cell) for cell in cells] == pytest.approx([n / 1e9 for n in expected], abs=0.051), size
        most = float(peak.split()[0])
        held = sum(expected[:3]) / 1e9  # in the optimizer's phase
        assert most > held
        assert fits == ("yes" if most <= 80 else "no")


def test_the_documents_errors_follow_from_its_measurements():
    import doctor

    halves = doctor.DOCUMENT.read_text().split("<!-- gpu: ")
    for file, prefix, written in zip((doctor.RESULT, doctor.CUDA_RESULT), ("", doctor.ON_GPU), halves, strict=True):
        for row in json.loads(file.read_text())["rows"]:
            # The first table; configurations that are timed stand in a second one too.
            line = next(x for x in written.splitlines() if x.startswith(f"| {row['name'].removeprefix(prefix)} | "))
            _, held, peak, error, beyond, *_ = line.strip("| ").split(" | ")
            guesses, measured = zip(*([int(n) for n in cell.split(", ")] for cell in (held, peak)), strict=True)
            exact = [row["measured"][name] / 2**20 for name in ("held", "peak")]
            assert list(measured) == [round(n) for n in exact]
            off = 100 * (guesses[1] / exact[1] - 1)
            assert float(error.split("%")[0]) == pytest.approx(off, abs=0.06 + 50 / exact[1])
            assert error.endswith("(missed)") == (abs(off) > 15)
            rest = exact[1] - exact[0]
            off = 100 * ((guesses[1] - guesses[0]) / rest - 1)
            assert float(beyond.split("%")[0]) == pytest.approx(off, abs=0.06 + 100 / rest)


def test_the_document_says_what_was_measured():
    """And the model as it is now still gives it: at least eight configurations, all peaks within the margin or marked as missed."""
    import doctor

    result, gpu = (json.loads(file.read_text()) for file in (doctor.RESULT, doctor.CUDA_RESULT))
    rows = [*result["rows"], *gpu["rows"]]
    guesses = {row["name"]: doctor.predicted(row["name"]) for row in rows}
    written = doctor.DOCUMENT.read_text()
    assert written == render(written, result, gpu, guesses, doctor.ON_GPU), "run python benchmarks/doctor.py --document"
    for found in (result, gpu):
        good = [abs(errors(row, guesses[row["name"]])[0]) <= MARGIN for row in found["rows"]]
        assert sum(good) >= 8


def test_the_documents_times_are_those_of_its_measurements():
    """Rollouts included, most estimates are within a factor of two, and each that is not is marked."""
    import doctor

    rows, written = json.loads(doctor.RESULT.read_text())["timed"], doctor.DOCUMENT.read_text()
    good = 0
    for row in rows:
        (line,) = (x for x in written.splitlines() if x.startswith(f"| {row['name']} | ") and x.count(" | ") == 2)
        sums = [sum(row[kind].values()) for kind in ("estimated", "measured")]
        rollouts = [row[kind]["rollout"] for kind in ("estimated", "measured")]
        for cell, exact in zip(line.strip("| ").split(" | ")[1:], (rollouts, sums), strict=True):
            assert [float(value.split()[0]) for value in cell.split(", ")] == pytest.approx(exact, abs=0.006)
        inside = 0.5 <= sums[0] / sums[1] <= 2
        assert line.endswith("(missed) |") == (not inside)
        good += inside and 0.5 <= rollouts[0] / rollouts[1] <= 2
    assert good >= 6


def test_eager_attention_and_attention_rows_are_read_from_the_recipe(tmp_path):
    eager = {"attn_implementation": "eager"}
    keys = {"model_init_kwargs": eager, "teacher_model_init_kwargs": eager, "output_dir": str(tmp_path)}
    entry = {"use": "oprd.objectives.attention:AttentionMaps", "layers": [1, 3]}
    found = workload_of(RunConfig.load("tiny", {**keys, "objectives": [entry]}))
    assert (found.eager, found.attention_layers) == (True, 2)
    plain = workload_of(RunConfig.load("tiny", {"output_dir": str(tmp_path)}))
    assert (plain.eager, plain.attention_layers) == (False, 0)
