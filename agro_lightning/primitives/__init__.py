"""Files, arrays, clocks, sharded tensors and collectives: nothing of reinforcement learning."""
