#!/bin/sh
# Fast Quiet-STaR (arXiv 2505.17746): shorter and shorter thoughts, then none, from a model that Quiet-STaR has trained.
#
#   runs/fast_quietstar.sh MODEL DATA OUT [FLAGS ...]   Not run by us at 7B: docs/recipes.md
#
# First thoughts of 16, 12 and 8 tokens, 50 steps each, then 50 steps that learn to do without them (docs/teacher.md).
set -eu
model=$1 data=$2 out=$3
shift 3
common="--data $data --per_device_train_batch_size 1 --learning_rate 1e-6 --block_size 256"
# shellcheck disable=SC2086
quietstar train --model "$model" --output_dir "$out/short" --stages 16-8:50,12-4:50,8-4:50 $common "$@"
# shellcheck disable=SC2086
exec quietstar train --model "$out/short" --output_dir "$out/none" --distil reward --max_steps 50 $common "$@"
