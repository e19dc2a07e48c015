"""Grading: studies, the service behind the page, what keeps every grade, and a simulated stand-in for an expert."""
