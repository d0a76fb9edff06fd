"""Find what a machine lacks to build and run engines, and the commands that fix it: `sfexport doctor`."""
