"""Training: one configuration, one state, one step, one loop."""
