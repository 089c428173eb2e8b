"""`doctor`: checks of a configuration before a long run."""
