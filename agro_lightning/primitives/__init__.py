"""Files, arrays and clocks: nothing of reinforcement learning."""
