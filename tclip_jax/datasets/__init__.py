"""Tools for data sets: prepare, check, show, and measure the input pipeline."""
