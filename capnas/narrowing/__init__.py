"""Narrower models: the width that each coupled group of layers needs, channels removed, their readers corrected."""
