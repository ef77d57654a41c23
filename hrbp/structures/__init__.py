"""Which shapes may a mask take, and what does each keep of a score?"""
