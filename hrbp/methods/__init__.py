"""How does a mask change while a model trains?"""
