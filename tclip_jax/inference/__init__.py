"""Using a model: embeddings of many images or texts, labels for images, and search in a folder of pictures."""
