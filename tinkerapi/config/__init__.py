"""The operator's settings: environment variables, and a TOML file for base models."""
