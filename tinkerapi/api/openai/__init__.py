"""OpenAI's completions over this server's sampling, for OpenAI's clients."""
