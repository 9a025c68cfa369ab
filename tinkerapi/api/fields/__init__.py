"""The fields of request bodies, in the terms that all dialects share."""
