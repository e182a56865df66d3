"""Models: loading targets, our own decoder with its KV cache, other models through transformers, memory estimates."""
