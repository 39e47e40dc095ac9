"""Two models compared number by number: weights, activations, inputs."""
