"""What this machine has, and whether it is fit to train on."""
