"""vLLM engines: in the training process (`engine.py`), or with a `vllm serve` process (`server.py`, `http.py`).

Imported by `rollouts/engines.py` and the benchmarks only; vLLM itself is imported at first use, so it need not be installed.
Start reading at `engine.py`; `weights.py` collects the student's weights. For a server, `weights_folder.py` writes them into a
folder that `held_folder.py` locks, and `requests.py` makes the server load them and requests rollouts, repeated as
`oprd/http/patience.py` says.
"""
