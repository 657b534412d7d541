#!/bin/bash
# A rollout server (vLLM) for rollout_engine: vllm_server, on a machine that sees the trainer's weights_dir.
#   HOST=10.0.0.9 bash serve_rollouts.sh /shared/weights [further options of vLLM]
# Its weight endpoints have no password: HOST is an address of a private network.
set -euo pipefail
weights=$1
shift
until [[ -e $weights/start/config.json ]]; do sleep 2; done # the trainer writes it at its first rollout
export VLLM_SERVER_DEV_MODE=1
# The trainer's precision: bfloat16 under bf16: true, else float32.
dtype=$(sed -n 's/.*dtype": "\([a-z0-9]*\)".*/\1/p' "$weights/start/config.json" | head -n 1)
exec python -m vllm.entrypoints.openai.api_server --model "$weights/start" --dtype "${dtype:-float32}" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
  --skip-tokenizer-init --enable-scale-out --generation-config vllm "$@"
