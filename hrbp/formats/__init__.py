"""What do files of weights hold?"""
