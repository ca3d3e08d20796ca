"""worm"""
