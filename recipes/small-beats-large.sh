#!/usr/bin/env bash
# The headline of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section 4.1): people prefer a small aligned model
# to an unaligned one a hundred times its size. Here a model of 74,000 parameters goes through the three stages; the
# others have 845,000.
#
# Claim: the small model after PPO scores higher than each large one: the SFT model, and the base asked three ways: by
# the chat template, by the grid alone, and by the grid and "most", the word before the richest walk in its training
# text (in place of the paper's few-shot prompt). The score ignores lies: the small model's walks are honest less often.
#
#   InstructGPT   1.3 B against 175 B; reward and value model 6 B; people prefer the small one
#   here          reward model that of instructgpt.sh; value model of the policy's size; PPO: lr 5e-4, KL 0.2
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft reward_model small_base small_sft

    heading "PPO of the small model, from the large reward model"
    python ppo.py --model $runs/small-sft --rewards $runs/reward_model --dataset $data/prompts.jsonl \
        --output-dir $out/small-ppo $common --epochs 2 --learning-rate 5e-4 --value-learning-rate 2e-3 \
        --warmup-ratio 0.1 --kl-coef 0.2 --batch-size 128 --ppo-epochs 2 --max-new-tokens 24 $(max_steps 3)

    heading "copies of the large base with other chat templates: the grid alone, and the grid and the word most"
    for ask in grid most; do
        mkdir -p $out/base-$ask
        cp $runs/base/{config,generation_config,tokenizer,tokenizer_config}.json $out/base-$ask
        cp $runs/base/model.safetensors $out/base-$ask
        after='\n\n'; [ $ask = grid ] || after+=$ask
        turn="{{ m['content'] }}{{ '$after' if m['role'] != 'assistant' }}"
        echo -n "{{ bos_token }}{% for m in messages %}$turn{% endfor %}" \
            > $out/base-$ask/chat_template.jinja
    done

    report $runs/base $out/base-{grid,most} $runs/{sft,small-sft} $out/small-ppo
done
exit $verdict
