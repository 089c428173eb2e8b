"""FSDP2, tensor parallelism, and what starts the ranks."""
