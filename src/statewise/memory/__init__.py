"""Blocks, pools and checkpoints: where the state of a sequence lives."""
