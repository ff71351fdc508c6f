"""Tools that train, measure and check: run each as `python -m tools.<name>` from the root of the repository."""
