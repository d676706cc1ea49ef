"""The methods that the papers compare with Q-GaLore: `--method` low_rank, lora, relora and qlora."""
