"""How does a dense model become a sparse one, and a sparse one dense again?"""
