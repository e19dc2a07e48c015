"""Trainers, one file for each method."""
