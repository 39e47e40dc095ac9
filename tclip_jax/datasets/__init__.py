"""Tools that make data sets and look at them."""
