"""CLIP's encoders as thin Flax modules, whose weights may be ternary."""
