"""Run by test_teacher_server.py on two processes: both ask the server that FOLDER/url names, and train with a teacher of their own.

    RANK=… LOCAL_RANK=… WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 python teacher_ranks_script.py FOLDER

Guards against hanging, and the way it ends, are in rank_process.py, which says why.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from rank_process import join, run_and_leave
from tiny import prompt_rows, tiny_model, tiny_trainer, weights


def main(out: Path) -> None:
    rank = join(out)
    teachers = {"there": {"url": (out / "url").read_text()}, "here": tiny_model(seed=1)}
    for name, teacher in teachers.items():
        trainer = tiny_trainer(
            out / name, teacher=teacher, max_steps=2, rows=prompt_rows(8), per_device_train_batch_size=2, diagnostic_steps=0,
            ddp_backend="gloo",
        )  # fmt: skip
        trainer.train(outputs=False)
        save_file(weights(trainer.model), out / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    run_and_leave(main)
