"""Fine-tunes a network on labelled images."""
