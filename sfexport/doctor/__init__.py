"""`sfexport doctor`: what this machine lacks to build and run engines, and the commands that fix it."""
