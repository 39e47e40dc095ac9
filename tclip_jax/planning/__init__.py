"""What a run needs on a machine that is not there: memory, collectives and time, from the compiled step."""
