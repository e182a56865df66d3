"""Models: loading of targets, our decoder and its KV cache, other models through transformers, memory estimates."""
