"""Run by test_teacher_cache.py: writes a cache, and is killed while it writes.

python cache_writing_script.py MODELS RESPONSES FOLDER SHARDS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import oprd.states.cache.folder as cached
from oprd.tools.cache_teacher import cache_teacher
from test_teacher_cache import run_of

if __name__ == "__main__":
    models, responses, folder, shards = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    plain, count = cached.save_file, 0

    def die_in_the_middle(tensors, file):
        global count
        plain(tensors, file)
        if count == shards:
            with open(file, "r+b") as half:
                half.truncate(file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    cached.save_file = die_in_the_middle
    cache_teacher(run_of(models, folder / "unused", max_completion_length=60), folder, Path(responses), shard_mib=1)
