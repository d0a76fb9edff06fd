"""Ask questions about a video: prompt, sampling of tokens, sessions, and the pipeline that makes them."""
