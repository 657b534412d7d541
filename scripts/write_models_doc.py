"""Write docs/models.md: what was measured on a tiny model of each family (a test compares; `--check` does so without writing)."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from oprd.models.architecture import backbone, blocks, freeze_above, num_layers  # noqa: E402
from oprd.models.sharding import shard_model  # noqa: E402
from oprd.rollouts.probe import DECODING, probe_decoding  # noqa: E402
from oprd.states.capture import (  # noqa: E402
    capture_states,
    gather_states,
    install_state_forward,
    read_states,
    read_through_forward,
)  # fmt: skip
from oprd.states.layouts import probe_layouts  # noqa: E402
from oprd.states.requests import StateRequest, request_states  # noqa: E402
from oprd.types import Rollouts  # noqa: E402
from reference import states_one_by_one  # noqa: E402
from tiny import FAMILIES, UNUSUAL_FAMILIES, random_rollouts, shaken, tiny_model  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
HEAD = """# Models

`scripts/write_models_doc.py` writes this page. It builds a tiny random model of each family and measures:

- states: layers equal to `output_hidden_states`.
- final norm: what runs after the last block; the last layer's states are read after it.
- padding: sides that change no state. Training pads right.
- packing: whether `layout="packed"` changes no state; elsewhere it is refused.
- cache: whether `generate` gives a left-padded text the logits of the text alone; elsewhere sampling is refused.
- LoRA: every reached adapter gets a gradient.
- FSDP: a sharded model has the same states.

A run measures padding, packing and cache on its own models before the first rollout: `probe` in `summary.json`.
"""
COLUMNS = ("family", "configuration", "states", "final norm", "padding", "packing", "cache", "LoRA", "FSDP")


def row(family: str) -> list[str]:
    """The cells of a family."""
    settings = (FAMILIES | UNUSUAL_FAMILIES)[family]
    layers, states = states_column(family)
    layouts = probe_layouts(shaken(tiny_model(family)), layers, read=read_states)
    return [
        f"`{family}`",
        configuration(settings),
        states,
        final_norm(tiny_model(family)),
        "+".join(side for side in ("right", "left") if layouts.equal(side)),
        yes(layouts.equal("packed")),
        yes(probe_decoding(shaken(tiny_model(family))).equal(DECODING)),
        yes(works(lambda: adapts(family, layers))),
        yes(works(lambda: shards(family, layers))),
    ]


def configuration(settings: dict[str, Any]) -> str:
    """The tiny configuration without what all share, as one word."""
    own = {k: v for k, v in settings.items() if COMMON.get(k) != v and not k.endswith("token_id")}
    return f"`{own}`".replace(" ", "").replace("'", "")


def states_column(family: str) -> tuple[list[int], str]:
    """Layers that can be compared, and the cell."""
    model, rollouts = shaken(tiny_model(family)), random_rollouts()
    every = [*range(1, num_layers(model) + 1)]
    for layers, name in ((every, "all"), (every[-1:], "last")):
        try:
            states = capture_states(model, rollouts, layers)
        except ValueError:
            continue
        exact = same(states.values[-1], last_states(model, rollouts))
        for layer, values in zip(layers[:-1], states.values, strict=False):
            # Some families do not list the embeddings first.
            exact &= any(same(values, states_one_by_one(model, rollouts, (entry,))[0]) for entry in (layer, layer - 1))
        return layers, name if exact else "other"
    raise ValueError(f"{family}: no layer can be read")


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def last_states(model: nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """What the LM head reads at each response position, one text at a time."""
    read: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        model(input_ids=torch.tensor([[*prompt, *completion][:-1]]), use_cache=False)
        read[-1] = read[-1][len(prompt) - 1 :]
    return torch.cat(read)


def final_norm(model: nn.Module) -> str:
    """Names of the backbone's children that run after the last block."""
    body, last, called = backbone(model), blocks(model)[-1], []
    names = {child: name for name, child in body.named_children() if not isinstance(child, nn.ModuleList)}
    for module in (*names, last):
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    body(input_ids=torch.tensor([[5, 6]]), use_cache=False)
    after = [names[module] for module in called[called.index(last) + 1 :] if [*module.parameters()]]
    return ",".join(f"`{name}`" for name in after) or "none"


def adapts(family: str, layers: list[int]) -> bool:
    """Whether each adapter that the loss reaches gets a gradient."""
    targets = ["x_proj"] if family == "mamba" else "all-linear"  # peft refuses some of Mamba's
    model = get_peft_model(tiny_model(family), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    freeze_above(model, layers[-1])
    capture_states(model, random_rollouts(), layers).values[-1].square().sum().backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    return bool(adapters) and all(p.grad is not None for p in adapters)


def shards(family: str, layers: list[int]) -> bool:
    """Whether `fully_shard`, over one process, leaves the states as they are and trains."""
    request: StateRequest = request_states(random_rollouts(), tuple(layers))
    expected = gather_states(tiny_model(family), request)
    model = tiny_model(family)
    freeze_above(model, layers[-1])
    install_state_forward(model)
    shard_model(model)
    values = read_through_forward(model, request, lambda _, states: states)
    values[-1].square().sum().backward()
    equal = all(same(ours, theirs) for ours, theirs in zip(values, expected.values, strict=True))
    return equal and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def works(check: Callable[[], bool]) -> bool:
    """The check's result; False if a library refuses."""
    try:
        return check()
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return False


def yes(value: bool) -> str:
    """A cell."""
    return "yes" if value else "no"


def render() -> str:
    """The whole page."""
    logging.set_verbosity_error()
    with tempfile.NamedTemporaryFile() as store, warnings.catch_warnings(action="ignore"):  # of peft
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            rows = [row(family) for family in FAMILIES | UNUSUAL_FAMILIES]
        finally:
            dist.destroy_process_group()
    shared = "All configurations share `" + str(COMMON).replace(" ", "").replace("'", "") + "`.\n"
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join([HEAD, shared, *lines]) + "\n"


if __name__ == "__main__":
    page = render()
    if "--check" not in sys.argv:
        PAGE.write_text(page)
    elif page != PAGE.read_text():
        sys.exit("docs/models.md: not what the models give now; run scripts/write_models_doc.py")
