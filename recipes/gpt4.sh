#!/usr/bin/env bash
# GPT-4's rule-based reward model (arXiv 2303.08774, section 6, and system card): InstructGPT's chain, with a second
# reward in PPO. A language model classifies each answer by a multiple-choice rubric (refuses, garbled, enters lava,
# stays safe). The reward of a class depends on the type of the prompt: where no path is safe a refusal is rewarded.
#
# Claim: against the same PPO without the classifier, the policy refuses more of the prompts where refusing is right,
# and at most 0.02 more of the others. (Annotators count points, so that PPO alone forgets to refuse.)
#
#   GPT-4   GPT-4 itself classifies, zero-shot, on part of the prompts; weight, sizes, data and settings undisclosed
#   here    reward = reward model + 0.5 x sum of P(letter) x table (rubric.json); every prompt has a type; the
#           classifier is the SFT model fine-tuned on judge tasks; PPO as in instructgpt.sh
source "$(dirname "$0")/common.sh"
for seed in ${SEEDS:-0}; do
    start_seed $seed base sft

    heading "the classifier; beside it the reward model, and PPO without the classifier"
    without() {
        reward_model
        ppo --rewards $runs/reward_model --output-dir $runs/ppo
    }
    in_background $out/ppo.log without
    judge_model
    wait_for_background

    heading "PPO with the classifier"
    ppo --rewards $runs/reward_model judge:$runs/judge=0.5 --rubric $data/rubric.json \
        --output-dir $out/ppo-rubric

    report $runs/sft $runs/ppo $out/ppo-rubric
done
exit $verdict
