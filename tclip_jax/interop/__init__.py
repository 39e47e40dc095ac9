"""Conversion to and from the files of other libraries."""
