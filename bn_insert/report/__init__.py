"""Reports on insertions and training runs: plain data in, JSON or one HTML page out."""
