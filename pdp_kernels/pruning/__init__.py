"""Pruning of whole models: PDP (Algorithm 1), SAP, reports, and conversion for inference."""
