"""Plans of runs on machines that are not available: memory, collectives and time, compiled or by formula."""
