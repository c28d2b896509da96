"""Data sets: images, points, captions and conditions, and the batches that training gets."""
