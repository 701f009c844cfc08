"""Where requests are run: our own engine, or anywhere else."""
