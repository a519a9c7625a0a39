"""What the other rooms build on: files written whole or not at all, work shared by processes, safe unpickling, text."""
