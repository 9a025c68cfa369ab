"""What an operator may set: environment variables, and a TOML file for base models."""
