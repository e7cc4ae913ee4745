"""LoRA-FA for relora_ray."""
