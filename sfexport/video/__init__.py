"""Turn a video file into pixels: choose frames, decode them, and preprocess them for the vision tower."""
