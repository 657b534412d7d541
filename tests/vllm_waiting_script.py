"""Run by test_vllm_server_faults.py: a trainer that samples by a server.

python vllm_waiting_script.py FOLDER URL
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import prompt_rows, tiny_trainer


def main(out: Path, url: str) -> None:
    trainer = tiny_trainer(
        out / "run", rollout_engine="vllm_server", rows=prompt_rows(8), per_device_train_batch_size=2,
        rollout_engine_kwargs={"weights_dir": str(out / "weights"), "base_url": url, "timeout": 1},
    )  # fmt: skip
    trainer.train(outputs=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
