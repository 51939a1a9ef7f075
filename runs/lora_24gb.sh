#!/bin/sh
# Quiet-STaR by LoRA on a GPU of 24 GB: Mistral-7B in 4 bits, adapters of rank 16, one thought of 8 tokens behind 64
# positions of each text. Not run by us: docs/recipes.md
#
#   runs/lora_24gb.sh DATA OUT [FLAGS ...]
set -eu
data=$1 out=$2
shift 2
exec quietstar train --model mistralai/Mistral-7B-v0.1 --data "$data" --output_dir "$out" --lora_r 16 --load_in_4bit \
  --thought_length 8 --lookahead 4 --num_thoughts 1 --anchors_per_text 64 --block_size 256 \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 1e-4 --policy_weight 1e4 \
  --max_steps 500 --bf16 --gradient_checkpointing "$@"
