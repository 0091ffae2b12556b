"""What if: plans over a grid of devices, batches, contexts and precisions."""
