"""Stands before pandas on the path of the commands that tests run: a base install does not have it.

Where it is there, pyarrow imports it into every process, in half a second.
"""

raise ImportError("not in a base install")
