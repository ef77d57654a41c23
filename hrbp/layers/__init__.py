"""What is a sparse layer, and what does it compute?"""
