"""To and from the files of other people's libraries."""
