"""ReLoRA pre-training on Ray. Start at `python -m relora_ray.launch`; README.md has the map."""

__version__ = "0.1.0"
