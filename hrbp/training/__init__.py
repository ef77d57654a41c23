"""How is a model trained, stopped and continued?"""
