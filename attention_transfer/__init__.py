"""Attention transfer: train a small convolutional network to look where a large one looks."""
