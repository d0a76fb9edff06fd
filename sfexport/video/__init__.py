"""From a file to pixels: choosing frames, decoding them, and shaping them for the vision tower."""
