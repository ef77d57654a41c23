"""What does `python -m hrbp` do?

A command is a file here with `add_NAME`, which adds its options and sets its function; main.py lists the commands.
"""
