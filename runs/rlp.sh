#!/bin/sh
# RLP (arXiv 2510.01265): thoughts at one random token of each text, rewarded against a moving average of the model that
# does not think; no loss of the text.
#
#   runs/rlp.sh DATA OUT           Qwen3-1.7B-Base with the paper's values. Not run by us.
#   runs/rlp.sh small OUT          the same objective on a model without training, in minutes on two CPU cores: it shows
#                                  that everything runs, and no more (held-out nll: 4.7 after 100 steps, 4.9 after 200).
#
# From the paper, section 3 and appendix 10: one token per document, 16 rollouts at temperature 0.7, 2,048 tokens of
# context and of a thought, batch 512, constant learning rate 1e-6, no KL, decay 0.999, leave-one-out advantages without
# a clamp, ratios clipped. 32 H100 there; the texts of a step are split over the GPUs that torchrun starts: 512 =
# GPUs * 2 * accumulation. It does not say how it clips (0.2 is PPO's) nor how many updates are made on the same
# thoughts (one here, with which the ratio is 1). Its prompt, which asks the model to think, has no place here: thoughts
# begin with a learned token.
set -eu

objective="--prediction thought --baseline teacher --teacher_decay 0.999 --advantage leave_one_out
  --advantage_clamp false --clip_ratio 0.2 --policy_temperature 0.7 --thought_temperature 0.7 --policy_weight 1
  --base_loss_weight 0 --talk_loss_weight 0 --num_thoughts 16 --lookahead 1 --anchors_per_text 1"

if [ "$1" = small ]; then
  out=$2
  mkdir -p "$out"
  python - "$out" <<'PYTHON'
import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

out = Path(sys.argv[1])
words = ["<end>", "---", *(f"n{i}" for i in range(20)), "plus", "is"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="---"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="---", eos_token="<end>").save_pretrained(out / "base")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
)
LlamaForCausalLM(config).save_pretrained(out / "base")
draw = random.Random(0)
with open(out / "sums.jsonl", "w") as file:
    for _ in range(4000):
        a, b = draw.randrange(10), draw.randrange(10)
        file.write(json.dumps({"text": f"n{a} plus n{b} is n{a + b}"}) + "\n")
PYTHON
  # shellcheck disable=SC2086
  exec quietstar train --model "$out/base" --data "$out/sums.jsonl" --output_dir "$out/run" $objective \
    --thought_length 8 --block_size 32 --per_device_train_batch_size 16 --max_steps 200 --learning_rate 1e-3 \
    --use_cpu --report_to none --logging_steps 20 --dataloader_pin_memory false
fi

# shellcheck disable=SC2086
exec torchrun --nproc_per_node "${GPUS:-8}" "$(command -v quietstar)" train --model Qwen/Qwen3-1.7B-Base --data "$1" \
  --streaming --output_dir "$2" $objective --learned_thought_end true --thought_length 2048 --block_size 2048 \
  --per_device_train_batch_size 2 --gradient_accumulation_steps "$((256 / ${GPUS:-8}))" --learning_rate 1e-6 \
  --lr_scheduler_type constant --warmup_steps 0 --max_steps "${STEPS:-200}" --bf16 --gradient_checkpointing
