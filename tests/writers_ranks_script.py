"""Run by test_teachers_write.py on two processes: two teachers, sharded like the student, write the rollouts.

    RANK=… LOCAL_RANK=… WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 python writers_ranks_script.py FOLDER

Guards against hanging, and the way it ends, are in rank_process.py, which says why.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from rank_process import join, run_and_leave
from tiny import prompt_rows, tiny_model, tiny_trainer


def trainer_of(folder: Path, world_size: int, **more):
    """Two steps of supervised training on greedy responses, which the number of processes does not change."""
    data = [row | {"teacher_id": "ab"[i % 2]} for i, row in enumerate(prompt_rows(9)[:8])]
    return tiny_trainer(
        folder, teacher={"a": tiny_model(seed=1), "b": tiny_model(seed=2)}, rows=data, max_steps=2, lmbda=0.0,
        representation_weight=0.1, output_space="cross_entropy", temperature=0.0, diagnostic_steps=0,
        per_device_train_batch_size=4 // world_size, adam_epsilon=1e-4, **more,
    )  # fmt: skip


def main(out: Path) -> None:
    rank = join(out)
    trainer = trainer_of(out / "sharded", 2, fully_shard=True, ddp_backend="gloo")
    trainer.train(outputs=False)
    whole = {name: weight.full_tensor().detach().clone() for name, weight in trainer.model.named_parameters()}
    save_file(whole, out / f"sharded-{rank}.safetensors")


if __name__ == "__main__":
    run_and_leave(main)
