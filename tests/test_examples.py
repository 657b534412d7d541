"""The example runs as it stands."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_minimal_loop(capsys):
    path = Path(__file__).parent.parent / "examples" / "minimal_loop.py"
    spec = importlib.util.spec_from_file_location("minimal_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(steps=2, prompts_per_step=4, learning_rate=1e-4, seed=0, problems=16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["before", "step    1", "after"]
    assert len(path.read_text().splitlines()) <= 100
