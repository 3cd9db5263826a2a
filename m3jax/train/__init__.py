"""Training: objective, optimizer, the jitted step, checkpoints and the loop of every stage."""
