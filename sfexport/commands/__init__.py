"""The verbs, one file each: options and help, one call, the result printed.

Each imports click and sfexport.console; what its verb needs is imported when the verb runs.
"""
