"""The kinds of runs, a module each."""
