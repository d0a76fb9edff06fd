"""`sfexport plan`: what a checkpoint would take on a machine, computed before anyone waits for a build."""
