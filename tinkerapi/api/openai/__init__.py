"""OpenAI's completions over this server's own sampling, for clients that speak nothing else."""
