#!/bin/sh
# Quiet-STaR as in the paper (arXiv 2403.09629): Mistral-7B on OpenWebMath, thoughts of 9 tokens between the two thought
# tokens, lookahead 4, 2 thoughts per position, texts of 256 tokens, batch 8, learning rate 1e-6, 100 steps.
#
#   runs/paper.sh OUT [FLAGS ...]          8 × H100 of 80 GB, one text each. Not run by us: docs/recipes.md
set -eu
out=$1
shift
exec accelerate launch --config_file "$(dirname "$0")/../examples/accelerate/fsdp2.yaml" --num_processes "${GPUS:-8}" \
  "$(command -v quietstar)" train --model mistralai/Mistral-7B-v0.1 --data open-web-math/open-web-math --streaming \
  --output_dir "$out" --thought_length 9 --lookahead 4 --num_thoughts 2 --block_size 256 \
  --per_device_train_batch_size 1 --learning_rate 1e-6 --max_steps 100 --bf16 --gradient_checkpointing "$@"
