"""Numerical parity: compare the weights, activations and inputs of two models."""
