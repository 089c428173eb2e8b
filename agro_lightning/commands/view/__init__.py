"""The command `view`: a run, or a buffer, as one HTML file."""
