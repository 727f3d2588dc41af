"""Ways to train that split learning is compared with: each holds the whole model, and splits nothing."""
