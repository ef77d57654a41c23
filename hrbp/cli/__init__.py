"""What does `python -m hrbp` do? A file a command."""
