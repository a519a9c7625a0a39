"""Fine-tunes a network on labeled images."""
