"""Training: the loop, the pretraining task, optimiser, checkpoints, guards and logs."""
