"""Evaluation of models: accuracy, probes, comparisons and HTML reports."""
