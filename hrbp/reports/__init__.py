"""What does a mask or a model keep, and what does it cost?"""
