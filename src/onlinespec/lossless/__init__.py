"""The promise: how tokens are chosen, noised and verified. Small, pure tensors."""
