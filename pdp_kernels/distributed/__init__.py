"""Weights that are sharded over ranks (DTensors): order statistics and sums of global weights."""
