"""Training: input, state, objective, step, loop, metrics, evaluation and stall detection."""
