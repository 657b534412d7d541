"""Samples with vLLM: in the training process (`engine.py`), or by a `vllm serve` process (`server.py` over `http.py`).

Only `rollouts/engines.py` and the benchmarks import this; vLLM itself is imported at the first use, so it need not be installed.
Start reading in `engine.py`; `weights.py` takes the student's live weights and `weights_folder.py` writes them for a server.
"""
