"""What do many trainings, side by side, come to?"""
