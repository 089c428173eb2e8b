"""Memory and communication of many ranks, estimated on fake tensors."""
