"""Grading: checklists, and a simulated stand-in for an expert."""
