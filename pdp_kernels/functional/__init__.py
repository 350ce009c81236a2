"""Public functions of tensors: thresholds, masks, allocation, PQ Index, compression."""
