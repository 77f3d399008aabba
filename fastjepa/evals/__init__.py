"""Evaluations of encoders on labelled images, frozen or fine-tuned; each module runs alone."""
