"""What does `python -m hrbp` do?

A command is a file here with `add_NAME`, which makes its options and says what runs; main.py lists the commands.
"""
