"""Where parts are put together: one recipe per job. Nothing else in the package knows more than its own room."""
