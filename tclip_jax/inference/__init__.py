"""What a model is used for: embeddings of many images or texts, labels for images, search in a folder of pictures."""
