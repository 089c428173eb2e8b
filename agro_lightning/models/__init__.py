"""Language models: the policy, its reference, and the packed batch that they read."""
