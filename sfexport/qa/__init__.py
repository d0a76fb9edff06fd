"""Asking questions about a video: prompt, sampling of tokens, sessions, and the pipeline that ties them together."""
