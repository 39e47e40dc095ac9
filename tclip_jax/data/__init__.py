"""Model inputs: sources of records, captions as tokens, images as pixels, augmentations, and batches of these."""
