"""Losses of contrastive training and distillation: pure functions on embeddings."""
