"""Adapters on frozen weights: LoRA, and ReLoRA, which merges and redraws them."""
