"""Other people's clients against a whole server."""
