"""Define the commands of `sfexport`, one file each: options and help, one call, the printed result.

Each file imports click and sfexport.console; what its command needs is imported when the command runs.
"""
