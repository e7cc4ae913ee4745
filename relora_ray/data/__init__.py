"""Token data: `prepare` writes it, `tokens` reads it, `order` says which rows a step takes, `loader` joins them."""
