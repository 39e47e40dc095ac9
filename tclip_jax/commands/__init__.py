"""The commands of `tclip`, one module each."""
