"""The deployment pages, tried.

Scripts that need programs of the system (nginx, systemd, Slurm, debootstrap), and what they share
with the test suite.
"""
