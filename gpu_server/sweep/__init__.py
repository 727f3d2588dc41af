"""Runs of a grid of settings, one after the other, on this machine."""
