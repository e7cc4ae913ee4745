"""What is run by hand, beside launch: see relora_ray/__main__.py."""
