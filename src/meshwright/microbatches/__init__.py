"""Microbatches: a batch worked on in parts, one after the other, by one device or by the stages of a pipeline."""
