"""Fine-tuning for GLUE and MMLU by Q-GaLore and by what its paper compares it with.

    python -m peft_pretraining.finetune.glue --task rte --method q_galore
    python -m peft_pretraining.finetune.mmlu --method qlora

The training itself is transformers' Trainer; `docs/guide/finetuning.md` has an example of each.
"""
