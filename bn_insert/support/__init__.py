"""What the other subpackages build on: atomic writes, work shared by processes, safe unpickling, text."""
