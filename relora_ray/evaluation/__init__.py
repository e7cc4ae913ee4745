"""How good a model is: perplexity, samples, fine-tuning on GLUE, and the harness of EleutherAI."""
