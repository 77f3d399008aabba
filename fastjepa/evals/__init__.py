"""Evaluations of frozen encoders on labelled images; each module runs alone."""
