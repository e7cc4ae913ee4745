"""Full-rank weights whose gradients are projected, so that an optimizer keeps less: GaLore."""
