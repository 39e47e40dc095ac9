"""What goes into a model: captions as tokens, images as pixels, augmentations, prompts, and their sources."""
