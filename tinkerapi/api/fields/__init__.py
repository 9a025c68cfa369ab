"""What a request body may hold, in the terms that all dialects share."""
